"""The table of a result file in Markdown, and its place in docs/HTTP_API.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import documents

BEGIN = "<!-- http: begin (made by `make bench-http`) -->"
END = "<!-- http: end -->"
# As the system that inspired this one reports itself.
ORIGINAL = {
    "jobs_per_s": "9.28",
    "submit_p95_ms": "11",
    "submit_p99_ms": "21",
    "completion_p95_ms": "2,037",
    "completion_p99_ms": "2,063",
    "failed": "0 %",
    "order": "-5.44 % / -0.58 %",
}


def made(result: dict[str, Any]) -> str:
    """Everything, below a line that says when and where."""
    machine, versions = result["machine"], result["versions"]
    alone, whole, chaos = result["median"], result["end_to_end"], result["chaos"]
    lines = [
        f"Measured on {result['taken'][:10]} on {machine['cpu']}, {machine['cores']} cores shared by clients,"
        f" server, workers and Redis, {versions['kernel']}; one server process; requests by"
        f" {result['generator']}.",
        "",
    ]
    if not result["quiet"] or result["scale"] < 1:
        lines += ["**Not a result:** the machine was busy or the run was shortened.", ""]
    lines += [
        "| | here | the original |",
        "|---|--:|--:|",
        f"| single submissions a second, 64 clients | {alone['submits_per_s']:,.0f} | - |",
        f"| submit at 1,000 requests/s, p95 / p99 ms | {_two(alone, 'submit')} | - |",
        f"| jobs a second in batches of 10,000 | {alone['batch_jobs_per_s']:,.0f} | - |",
        f"| load: jobs a second, to their result | {whole['jobs_per_s']:,.1f} | {ORIGINAL['jobs_per_s']} |",
        f"| load: submit, p95 / p99 ms | {_two(whole, 'submit')} | {_theirs('submit')} |",
        f"| load: completion, p95 / p99 ms | {_two(whole, 'completion')} | {_theirs('completion')} |",
        f"| chaos: jobs that failed | {chaos['failed'] / chaos['jobs']:.0%} of {chaos['jobs']:,},"
        f" {chaos['workers_killed']} workers killed | {ORIGINAL['failed']} |",
        f"| chaos: completion, p95 / p99 ms | {_two(chaos, 'completion')} | - |",
    ]
    if order := result.get("order"):
        ours = " / ".join(f"{order['vs_fifo'][name]:+.1%}" for name in ("mean", "p95"))
        lines.append(f"| ML against FIFO: completion, mean / p95 | {ours} | {ORIGINAL['order']} |")
    return "\n".join(lines)


def _two(figures: dict[str, float], what: str) -> str:
    return " / ".join(f"{figures[f'{what}_{part}_ms']:,.1f}" for part in ("p95", "p99"))


def _theirs(what: str) -> str:
    return " / ".join(ORIGINAL[f"{what}_{part}_ms"] for part in ("p95", "p99"))


def put(result: dict[str, Any], path: Path) -> None:
    """Between the marks of the file."""
    path.write_text(documents.put(made(result), path.read_text(), BEGIN, END, gap="\n"))
