// The rules of parity/sampling.py from logits to a token, in float64 and in the same order.

// Logits in float64 after the repetition penalty, which is off by default; seen: Set of ids that are in the text.
export function penalized(logits, seen, penalty = 1) {
  const z = Float64Array.from(logits);
  if (penalty !== 1) for (const id of seen) z[id] = z[id] > 0 ? z[id] / penalty : z[id] * penalty;
  return z;
}

// Probabilities after the rules; 0 for a token that a rule drops.
//   logits: array [V]; seen: Set of ids that are in the text; options: an option that is undefined is off.
export function distribution(logits, seen, options) {
  const {temperature = 1, topK, topP, minP, repetitionPenalty} = options;
  const z = penalized(logits, seen, repetitionPenalty);
  let best = 0;
  for (let id = 1; id < z.length; id += 1) if (z[id] > z[best]) best = id;
  const probs = new Float64Array(z.length);
  if (temperature === 0) {
    probs[best] = 1;
    return probs;
  }
  const smallest = topK !== undefined && topK < z.length ? Float64Array.from(z).sort()[z.length - topK] : -Infinity;
  let total = 0;
  for (let id = 0; id < z.length; id += 1) {
    probs[id] = z[id] < smallest ? 0 : Math.exp((z[id] - z[best]) / temperature);
    total += probs[id];
  }
  for (let id = 0; id < z.length; id += 1) probs[id] /= total;
  const largest = probs[best];
  if (topP !== undefined && topP < 1) {
    const ordered = Float64Array.from(probs).sort().reverse();
    let mass = 0;
    let last = 0;
    for (let i = 0; i < ordered.length; i += 1) {
      mass += ordered[i];
      if (mass - ordered[i] < topP) last = i;
    }
    drop(probs, ordered[last]);
  }
  if (minP !== undefined && minP > 0) drop(probs, minP * largest);
  return probs;
}

function drop(probs, limit) {
  for (let id = 0; id < probs.length; id += 1) if (probs[id] < limit) probs[id] = 0;
}

// Inverse CDF over the kept tokens in order of id, for a random number u in [0, 1): {id, margin}. The margin is how far
// u is from the nearest end of the token's interval.
export function choose(probs, u) {
  let total = 0;
  for (const p of probs) total += p;
  let reached = 0;
  let last = 0;
  let lastStart = 0;
  for (let id = 0; id < probs.length; id += 1) {
    if (probs[id] === 0) continue;
    const start = reached;
    reached += probs[id];
    if (reached > u * total) return {id, margin: Math.min(u - start / total, reached / total - u)};
    [last, lastStart] = [id, start];
  }
  return {id: last, margin: Math.min(u - lastStart / total, 1 - u)};
}

export function kept(probs) {
  let count = 0;
  let mass = 0;
  for (const p of probs) {
    if (p > 0) count += 1;
    mass += p;
  }
  return {count, mass};
}

// Ids of the `count` largest values, in descending order; ties go to the lower id.
export function largest(values, count) {
  const threshold = Float64Array.from(values).sort()[Math.max(0, values.length - count)];
  const ids = [];
  values.forEach((value, id) => {
    if (value >= threshold) ids.push(id);
  });
  return ids.sort((a, b) => values[b] - values[a] || a - b).slice(0, count);
}
