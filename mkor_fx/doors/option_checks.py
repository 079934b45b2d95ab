"""Which options and rules go together, in which door, checked before anything is changed."""

from __future__ import annotations

from ..options import Options
from ..passes.torch_api.backend import CUDA_GRAPHS
from ..passes.write.derive import in_the_way


def check_cuda_graphs(options: Options) -> None:
    """A whole step writes to its weights and state, which Inductor's CUDA graphs take for inputs of one call."""
    if options.compiler.options.get(CUDA_GRAPHS):
        asked = f"mode={options.mode!r}" if options.mode is not None else f"options={{{CUDA_GRAPHS!r}: True}}"
        raise ValueError(
            f"compile_step with {asked}: asks for CUDA graphs, which Inductor leaves out, in silence, where a program "
            "changes its inputs in place, as a step does its weights. Use mode=None or 'max-autotune-no-cudagraphs'; "
            "mkor_fx.compile takes it, for forward and backward"
        )


def check_late(options: Options) -> None:
    """Raises ValueError for what cannot be one step late."""
    if not options.stale:
        return
    for rule in options.rules:
        if rule.reads_gradient:
            raise ValueError(
                f"stale=1 delays what crosses the network, but {rule} also refreshes from the gradient of its own step: use "
                "stale=0, or a rule of statistics alone"
            )
    if options.communication.statistics_dtype is not None:
        raise ValueError("stale=1 hides the statistics' transfer: leave Communication(statistics_dtype) at None")


def check_spread(options: Options) -> None:
    """Raises ValueError for rules whose derivations cannot be put off."""
    if options.derive == "together":
        return
    if not any(rule.overrides("derive") for rule in options.rules):
        raise ValueError("derive='spread': no rule here derives anything outside of its program: there is nothing to spread")
    for rule in options.rules:
        names = in_the_way(rule.at_first_step) if rule.overrides("derive") else ()
        if names:
            raise ValueError(
                f"derive='spread' takes over what was derived of an earlier state, and {type(rule).__name__} also changes "
                f"{', '.join(sorted(names))} at the steps between: use derive='together'; with refresh_phases weights "
                "take turns"
            )


def check_placement(options: Options) -> None:
    """Raises ValueError for rules, and for other options, that need what only some ranks have."""
    if options.placement == "local":
        return check_local(options)
    if options.communication.compress is not None and options.placement in ("replicated", 1):
        raise ValueError(
            "Communication(compress=...) is for what owners send, and with placement='replicated' ranks only exchange "
            "sums, which do not survive rounding by each rank's own step: use placement='owner', a share, or 'local'"
        )
    for rule in options.rules:
        if options.placement not in ("replicated", 1) and rule.reads_state:
            raise ValueError(
                f"placement={options.placement!r} keeps a weight's state on some ranks, and {type(rule).__name__} reads it "
                "for the statistics of every rank (reads_state): use placement='replicated' or 'local'"
            )
    return None


def check_local(options: Options) -> None:
    """Raises ValueError for what does not fit weights whose statistics are those of one rank's rows."""
    for rule in options.rules:
        if rule.gathers is not None:
            raise ValueError(
                f"placement='local' takes a weight's statistics from the rows of one rank, and {type(rule).__name__} "
                "gathers those of all (gathers): use placement='owner', or a rule of sums over rows"
            )
    idle = {"statistics_dtype", "speeds"} & {*options.communication.changed()}
    if options.stale or idle:
        what = "stale=1" if options.stale else f"Communication({', '.join(sorted(idle))})"
        raise ValueError(
            f"{what} is about statistics that cross the network, and with placement='local' none do: leave one out"
        )


def check_in_backward(options: Options) -> None:
    """Raises ValueError for rules that cannot make their direction before the gradient is whole."""
    for rule in options.rules:
        reasons = {
            "reads the gradient at its refresh (reads_gradient)": rule.reads_gradient,
            "keeps moments of the whole gradient (advance)": rule.overrides("advance"),
            "keeps moments of its directions (normalize)": rule.overrides("normalize"),
            "makes steps of its own (applies='update')": rule.applies == "update",
            "sizes each direction by itself (graft='rms')": rule.graft == "rms",
            "sizes all directions together (kl_clip)": rule.kl_clip is not None,
        }
        for what, there in reasons.items():
            if there:
                raise ValueError(
                    f"{type(rule).__name__} {what}, and cannot precondition in the backward, where gradients come in parts "
                    "and the refresh comes later: use precondition='step', or a rule that only multiplies, such as "
                    "MKOR.published()"
                )


def check_drop_in(options: Options) -> None:
    """Raises ValueError for options that ``compile`` cannot honour, or that would do nothing there."""
    if options.hybrid is not None and options.precondition == "backward":
        raise ValueError("Hybrid leaves its rule between two steps of an optimizer: use precondition='step' or compile_step")
    communication = options.communication
    if communication.average != "ranks":
        raise ValueError("Communication(average='rows') needs compile_step: here the gradients are averaged elsewhere")
    idle = {"gradient_bytes", "padding", "statistics_dtype"} & {*communication.changed()}
    if idle:
        raise ValueError(
            f"Communication({', '.join(sorted(idle))}) would do nothing here, where gradients are the wrapper's or yours to "
            "average and statistics travel as they are: leave it out, or use mkor_fx.compile_step"
        )
    if options.placement not in ("replicated", 1, "local"):
        raise ValueError(
            f"placement={options.placement!r} needs compile_step, which takes gradients to owners: here they are averaged "
            "before the library sees them. Use placement='local', whose owners broadcast directions, or 'replicated'"
        )
    check_placement(options)
    if options.placement == "local":
        _check_local_drop_in(options)
    check_spread(options)
    if options.precondition == "backward":
        check_in_backward(options)
        if options.derive == "spread":
            raise ValueError(
                "derive='spread' needs precondition='step': with 'backward' a state may be asked for before it is refreshed"
            )


def _check_local_drop_in(options: Options) -> None:
    if options.precondition == "backward":
        raise ValueError(
            "precondition='backward' multiplies on every rank by factors that with placement='local' one rank has: "
            "leave one out"
        )
    for rule in options.rules:
        if rule.reads_state:
            raise ValueError(
                f"placement='local' keeps a weight's state on one rank, and {type(rule).__name__} reads it in the backward "
                "of every rank (reads_state): use compile_step, where only its owner's program does, or "
                "placement='replicated'"
            )
