"""recover.md: the words on top, then the figure, the table, when each method is worth it, and how it was measured."""

from collections.abc import Iterable, Mapping, Sequence

from quantize.recover_rows import Row
from quantize.recover_words import NOISE, Point, best, by_bits, choice, points, shown_kl, verdicts, words


def markdown(rows: Sequence[Row], conditions: Mapping[str, str]) -> str:
    """recover.md: the words, the table, and what it was measured on."""
    found = points(rows)
    failed = [row for row in rows if row.error]
    parts = [f"# Quality against cost: {conditions.get('model', 'a model')}"]
    if found:
        parts += [_bullets(words(rows)), "![KL against seconds](recover.png)", table(found)]
        parts += ["## When each is worth it", _bullets(verdicts(found))]
    else:
        parts.append("No run has ended in a checkpoint that could be compared.")
    if failed:
        parts += ["## Failed", _bullets(f"{row.name}: {row.error}" for row in failed)]
    parts += ["## How", _HOW, _bullets(f"{name}: {value}" for name, value in conditions.items())]
    return "\n\n".join(parts) + "\n"


_HOW = f"""\
Each run is a process of its own, timed once: seconds are its wall time, interpreter and imports included, memory its
largest resident set (of the host: a GPU's own memory is not in it). A trained run that found its start in the cache
is charged the seconds that it took the run that made it. KL(original || quantized) is teacher-forced, in nats a
token, on text that nothing was calibrated on (whether a --corpus holds it was not looked at). Tokens are those of
calibration and training, as often as they were seen. Of several seeds the mean is told, ± the standard deviation;
means that are no further apart than two standard deviations of a difference of two runs are not told apart. A KL
below {NOISE:g} is float32's own. What another draw of text would give is not in these figures."""


def table(found: Sequence[Point]) -> str:
    """Every point, the most bits first; the choice in bold."""
    lines = [
        "| bits | method | seconds | tokens seen | peak MiB | KL, nats | x best | perplexity | same top-1 |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for bits, group in by_bits(found).items():
        for point in group:
            name = f"**{point.name}**" if point is choice(group) else point.name
            seeds = f" ({point.seeds} seeds)" if point.seeds > 1 else ""
            tokens = "" if point.tokens is None else f"{point.tokens:,.0f}"
            cells = (
                str(bits), name + seeds, f"{point.seconds:.1f}", tokens, f"{point.peak_mib:,.0f}", shown_kl(point),
                f"{point.kl / best(group).kl:.3g}", f"{point.perplexity:.4g}", f"{100 * point.agreement:.2f} %",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
