"""What the site takes from the code and from the files at the root instead of from second copies.

MkDocs calls `on_files`. Home, changelog, contributing and security are the files at the root;
settings, API and command line are made from the package.
"""

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import hvd_lbt
from hvd_lbt.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {page: from_root(name) for name, page in PAGES.items()}
    pages["reference/api.md"] = api()
    pages["reference/settings.md"] = settings()
    pages["reference/command_line.md"] = command_line()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def from_root(name: str) -> str:
    """A Markdown file of the root; its links lead into the site or to nothing."""
    text = (ROOT / name).read_text("utf-8")
    for source, page in PAGES.items():
        text = text.replace(f"]({source})", f"]({page})")
    text = re.sub(r'(\]\(|srcset="|src=")docs/', r"\1", text)
    # What is not part of the site: the link's text alone.
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)#]*(?<!\.md)(?<!\.svg)(?<!\.png)\)", r"\1", text)


def api() -> str:
    """One entry for each public name, by the module that defines it."""
    lines = ["# Python API", "", "Everything below is imported from `hvd_lbt`.", ""]
    for name in hvd_lbt.__all__:
        value = getattr(hvd_lbt, name)
        if module := getattr(value, "__module__", None):
            lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)


def settings() -> str:
    """The sections of a recipe, from its types."""
    lines = ["# Settings of a recipe", "", "`SECTION.KEY` of the YAML file and of `--set`.", ""]
    for section, field in Recipe.model_fields.items():
        kind: Any = field.annotation
        if hasattr(kind, "__module__") and kind.__module__.startswith("hvd_lbt"):
            options = (
                "    options: {heading_level: 3, show_root_heading: false, members_order: source}"
            )
            lines += [f"## {section}", "", f"::: {kind.__module__}.{kind.__name__}", options, ""]
    return "\n".join(lines)


def command_line() -> str:
    """`--help` of each command."""
    from hvd_lbt.cli import COMMANDS

    lines = ["# Command line", ""]
    for name, (module, what) in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"hvd_lbt {name}", description=what)
        importlib.import_module(module).add_arguments(parser)
        lines += [f"## hvd_lbt {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)
