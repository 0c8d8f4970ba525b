// Requests to the server of this page.

let key = sessionStorage.getItem("key") ?? "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

function headers() {
  return {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // not in the API's form
  }
  throw Object.assign(new Error(message), {status: response.status});
}

async function request(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it still running?");
  }
}

export async function get(path) {
  return (await checked(await request(path, {headers: headers()}))).json();
}

export async function post(path, body, signal) {
  return (await checked(await request(path, {method: "POST", headers: headers(), body: JSON.stringify(body), signal}))).json();
}

// Yields the data of server-sent events; an event "error" is thrown.
export async function* events(path, body, signal) {
  const response = await checked(await request(path, {method: "POST", headers: headers(), body: JSON.stringify(body), signal}));
  const decoder = new TextDecoder();
  let buffer = "";
  for await (const bytes of chunks(response.body)) {
    buffer += decoder.decode(bytes, {stream: true});
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data: "));
      if (!lines.length || lines[0] === "data: [DONE]") continue;
      const data = JSON.parse(lines.map((line) => line.slice(6)).join("\n"));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.releaseLock();
  }
}

const arrays = {float32: Float32Array, uint16: Uint16Array};

// The array of {shape, data}: little-endian numbers in base64.
export function unpack(entry, dtype) {
  const bytes = Uint8Array.from(atob(entry.data), (c) => c.charCodeAt(0));
  return new arrays[dtype](bytes.buffer);
}
