"""Put the same piece of code in two frameworks into tabs: adjacent cells of a notebook with the tags torch and jax."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx_design.shared import create_component

LABELS = {"tag_torch": "PyTorch", "tag_jax": "JAX"}
"""{class that MyST-NB gives a cell with the tag: label of its tab}"""


def label(node: nodes.Node) -> str | None:
    """Return the label of the tab that a node belongs in, or None if it is no cell of a framework."""
    if not isinstance(node, nodes.container) or "cell" not in node["classes"]:
        return None
    return next((LABELS[name] for name in node["classes"] if name in LABELS), None)


class FrameworkTabs(SphinxTransform):
    """Replaces each run of adjacent cells of different frameworks by a tab set of sphinx-design."""

    default_priority = 500

    def apply(self, **options: Any) -> None:
        """Transform the document."""
        for parent in list(self.document.findall(nodes.Element)):
            run: list[nodes.Element] = []
            for child in [*parent.children, nodes.comment()]:
                name = label(child)
                if run and (name is None or name in map(label, run)):
                    if len(run) > 1:
                        parent.replace(run[0], tab_set(run))
                        for cell in run[1:]:
                            parent.remove(cell)
                    run = []
                if name is not None:
                    run.append(child)


def tab_set(cells: list[nodes.Element]) -> nodes.Element:
    """Return a tab set with a tab for each cell; all tab sets of a page switch together."""
    result = create_component("tab-set", classes=["sd-tab-set"])
    for cell in cells:
        name = label(cell) or ""
        title = nodes.rubric(name, name, classes=["sd-tab-label"], sync_id=name, sync_group="framework")
        content = create_component("tab-content", classes=["sd-tab-content"], children=[cell.deepcopy()])
        item = create_component("tab-item", classes=["sd-tab-item"], selected=False, children=[title, content])
        result.append(item)
    return result


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform."""
    app.add_transform(FrameworkTabs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
