"""The report's second part for one schedule: held-out curves, mixtures over time, and repeated data."""

from collections.abc import Mapping

import numpy as np

from acodm_env.experiments.comparison.load import Comparison
from acodm_env.experiments.report.curves import (
    MANY_EPOCHS,
    Mixtures,
    baseline_of,
    curve,
    difference_curve,
)
from acodm_env.experiments.report.figure_style import Style, domain_styles, mixer_styles
from acodm_env.experiments.report.figures import (
    MAX_BANDS,
    Curve,
    curves_figure,
    difference_figure,
    difference_range,
    mixture_figure,
)
from acodm_env.experiments.report.page import Cell, Figures, Html, element, join, key, table

WORDS = {"perplexity": "Mean held-out perplexity", "loss": "Mean held-out loss, nats"}
DIFFERENCES = {"perplexity": ("perplexity, % of {}'s", "%", 100.0), "loss": ("loss, nats", "nats", 1.0)}


def curve_sections(comparison: Comparison, schedule: str, figures: Figures) -> Html:
    """Perplexity and loss against tokens, and every mixer's difference to the baseline as a small multiple."""
    styles = mixer_styles(comparison.mixers, baseline_of(comparison))
    parts: list[str] = [element("h3", "Held-out perplexity and loss over training"), _curve_lead(comparison, schedule)]
    for metric, title in WORDS.items():
        found = [one for name in comparison.mixers if (one := curve(comparison, name, schedule, metric)) is not None]
        if not found:
            return join([parts[0], element("p", "No run has been evaluated yet.")])
        figure = curves_figure(found, styles, y_title=title, log=metric == "perplexity")
        parts.append(figures.frame(figure, f"{title} of {len(found)} mixers against training tokens", title=title))
        parts.append(key({one.name: styles[one.name] for one in found}, "legend phone"))
    return join([*parts, *_difference_parts(comparison, schedule, styles, figures)])


def _curve_lead(comparison: Comparison, schedule: str) -> Html:
    words = "Means over seeds; the first fifth of the run may lie above the frame. On a wide screen a click on a name "
    words += "hides it, and a double click shows it alone."
    if len(comparison.mixers) > MAX_BANDS and len(comparison.seeds) > 1:
        words += " The 95 % bands are in the small pictures below, where they do not cover each other."
    elif len(comparison.seeds) > 1:
        words += " Bands: 95 % over seeds (Student t)."
    short = [
        name for name in comparison.mixers if any(run.status == "diverged" for run in comparison.select(name, schedule))
    ]
    if short:
        words += f" {', '.join(short)}: only the seeds that did not diverge are drawn, which flatters."
    return element("p", words, class_="soft lead")


def _difference_parts(
    comparison: Comparison, schedule: str, styles: Mapping[str, Style], figures: Figures
) -> list[Html]:
    baseline = baseline_of(comparison)
    parts = []
    for metric, (words, unit, scale) in DIFFERENCES.items():
        found = [
            _scaled(one, scale)
            for name in comparison.mixers
            if name != baseline and (one := difference_curve(comparison, name, schedule, metric)) is not None
        ]
        if not found:
            continue
        span = difference_range(found)
        panels = [
            figures.frame(
                difference_figure(one, styles[one.name], span=span, unit=unit),
                f"{one.name} minus {baseline}, {metric}, against training tokens",
                title=one.name,
            )
            for one in found
        ]
        title = f"Difference to {baseline} over training: {words.format(baseline)}"
        lead = f"Against training tokens, paired by seed; below the line is better than {baseline}; the band is the "
        lead += "95 % interval over seeds (Student t). All on one scale."
        parts += [
            element("h3", title),
            element("p", lead, class_="soft lead"),
            element("div", *panels, class_="panels"),
        ]
    return parts


def _scaled(one: Curve, scale: float) -> Curve:
    return Curve(
        name=one.name,
        tokens=one.tokens,
        mean=one.mean * scale,
        low=one.low * scale,
        high=one.high * scale,
        num_seeds=one.num_seeds,
    )


def mixture_sections(comparison: Comparison, mixtures: Mixtures, figures: Figures) -> Html:
    """The mixtures that change, over time; the average of all; and the epochs."""
    title = element("h3", "Mixture over time")
    if not mixtures.found:
        return join([title, element("p", "No run has logged a step yet.")])
    seeds = ", ".join(map(str, mixtures.seeds))
    changing = {name: one for name, one in mixtures.found.items() if one.changes}
    fixed = [name for name in mixtures.found if name not in changing]
    words = (
        f"Seed {seeds}, against training tokens. Solid: requested; dotted: realised, smoothed over a twenty-fifth of "
    )
    words += "the run. The colour and the marker on the solid line say which domain."
    if fixed:
        words += f" Not drawn, because they do not change: {', '.join(fixed)}; their weights are in the table below."
    styles = domain_styles(comparison.domains)
    panels = [
        figures.frame(
            mixture_figure(one.tokens, one.requested, one.realised, styles),
            f"mixture of {name}, seed {one.seed}, against training tokens",
            title=f"{name} (seed {one.seed})" if len(mixtures.seeds) > 1 else name,
        )
        for name, one in changing.items()
    ]
    return join(
        [
            title,
            element("p", words, class_="soft lead"),
            key(styles) if panels else "",
            element("div", *panels, class_="panels") if panels else "",
            _average_table(comparison, mixtures),
            element("h3", "Epochs used"),
            _epoch_lead(comparison, mixtures),
            _epoch_table(comparison, mixtures),
        ]
    )


def _average_table(comparison: Comparison, mixtures: Mixtures) -> Html:
    rows = [
        [name, *(f"{share:.1%}" for share in np.nanmean(one.requested, axis=0))] for name, one in mixtures.found.items()
    ]
    return table(("mixer", *comparison.domains), rows, "Requested mixture, averaged over the run")


def _epoch_lead(comparison: Comparison, mixtures: Mixtures) -> Html:
    repeated = [
        f"{domain} under {name} ({epochs:.1f})"
        for name, one in mixtures.found.items()
        for domain, epochs in zip(comparison.domains, one.epochs, strict=True)
        if epochs > MANY_EPOCHS
    ]
    words = "How often each domain's training data was passed over. Up to 4 epochs are nearly as good as new data "
    words += "(Muennighoff et al., arXiv 2305.16264). "
    if not repeated:
        return element("p", words, "No domain was used more often.", class_="soft lead")
    more = f" and {len(repeated) - 6} more" if len(repeated) > 6 else ""
    warning = f"⚠ More than that: {', '.join(repeated[:6])}{more}."
    return element("p", words, element("strong", warning), class_="soft lead")


def _epoch_table(comparison: Comparison, mixtures: Mixtures) -> Html:
    rows = [
        [name, *(Cell(f"⚠ {n:.1f}", "warn") if n > MANY_EPOCHS else f"{n:.2f}" for n in one.epochs)]
        for name, one in mixtures.found.items()
    ]
    seeds = ", ".join(map(str, mixtures.seeds))
    return table(("mixer", *comparison.domains), rows, f"Epochs at the end of training, seed {seeds}")
