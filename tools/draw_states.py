"""Draw the job's states from the table of moves: `python tools/draw_states.py` writes docs/JOB_STATES.md."""

from pathlib import Path

from scheduler.model.events import MOVES
from scheduler.model.jobs import FINAL_STATES, JobState

PAGE = Path(__file__).parent.parent / "docs" / "JOB_STATES.md"

MEANING = {
    JobState.PENDING: "accepted, on disk, waiting; `wattshift explain` says for what",
    JobState.STARTING: "has its GPUs; the launcher was asked to start its process",
    JobState.RUNNING: "its process runs",
    JobState.SUSPENDED: "frozen in a power shed: it does no work and keeps its GPUs and their memory",
    JobState.PREEMPTING: "has its notice and gives way; afterwards it waits again under the same id",
    JobState.STOPPING: "has its notice and ends for its own sake: cancelled, time limit, deadline",
    JobState.SUCCEEDED: "ended with exit code 0",
    JobState.FAILED: "ended otherwise; the reason says how",
    JobState.CANCELLED: "ended because somebody asked, or because a preemption cancels it",
}


def page() -> str:
    """The whole page."""
    lines = [
        "# Job states",
        "",
        "Drawn from `MOVES` in `scheduler/model/events.py` by `tools/draw_states.py`; a test compares them.",
        "Any other move raises and changes nothing.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> PENDING",
    ]
    for state in JobState:
        lines += [f"    {state} --> {to}" for to in JobState if to in MOVES[state]]
        if state in FINAL_STATES:
            lines.append(f"    {state} --> [*]")
    lines += ["```", "", "| state | meaning |", "|--|--|"]
    lines += [f"| {state} | {MEANING[state]} |" for state in JobState]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
