"""Keys of the networks and of how they are trained."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfsup.schema.kinds import Duration, OpenSection, Positive, Probability, Section, parse_duration


class BackboneConfig(OpenSection):
    """A backbone by its timm name, or mit_b0 to mit_b5; every other key is an option of timm's `create_model`.

    Of ResNets besides: deformable=[3, 4], deformable_modulated (see `backbones/deformable.py`).
    """

    name: str = "vit_small_patch16_224"
    pos_interp: Literal["size", "timm", "dino"] = "timm"
    """How position embeddings meet another image size: bicubic by size, timm's (antialiased), or DINO's by scale factor."""
    in_chans: Positive = 3
    pretrained: bool = False
    init: Literal["default", "xavier"] = "default"
    """Of weights that are not pretrained: timm's own, or uniform of Glorot & Bengio, 2010, equation 16, with zero biases."""

    @model_validator(mode="after")
    def _check_init(self) -> "BackboneConfig":
        if self.pretrained and self.init != "default":
            raise ValueError(
                f"init={self.init} would undo pretrained=true; leave out one of backbone.init and backbone.pretrained"
            )
        return self


class MethodConfig(OpenSection):
    """A method by name, or `package.module:Class`; its options are checked by its own schema."""

    name: str = "dino"


class TeacherConfig(Section):
    """A frozen network to learn from, for methods that take one (distill, deit)."""

    path: str | None = None
    """Run, RUN@student, checkpoint, exported folder, weights file, timm name, or `package.module:function`."""
    pretrained: bool = True
    """Of a timm name: with its published weights; there is no other way to learn from it."""
    size: Positive | None = None
    """Pixels at which it sees the student's views; null: those it was built for."""
    mean: tuple[float, ...] | None = None
    """Per channel, of values in [0, 1]; null: as its files say, or as the student's."""
    std: tuple[float, ...] | None = None
    cache: str | None = None
    """Folder in which its outputs are kept, in half precision, and found again."""
    cache_epochs: Positive = 1
    """With a cache, the augmentation repeats after so many epochs."""
    cache_topk: Positive | None = None
    """With a cache, keep the largest k logits and the mass of the others; null: all of them."""

    @model_validator(mode="after")
    def _check(self) -> "TeacherConfig":
        if self.cache is None and (self.cache_epochs != 1 or self.cache_topk is not None):
            raise ValueError("cache_epochs and cache_topk are of a cache; give teacher.cache=FOLDER as well")
        return self


class OptimizerConfig(Section):
    """Optimizer, its schedules, regularisation of weights, and clipping."""

    name: Literal["adamw", "sgd", "lars", "lamb", "adafactor", "adabound"] = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate as it is used; default: base_lr * global_batch / 256."""
    base_lr: Annotated[float, Field(gt=0)] = 5e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Where the schedule ends; 0 for a cool-down to zero."""
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    """After the warm-up: down to min_lr by half a cosine or a line; at the peak; or times step_factor at each milestone."""
    warmup: Duration = "10%"
    warmup_kind: Literal["gradual", "constant"] = "gradual"
    """Rise to the peak in a line, or stay low and then jump (Goyal et al., 2017, section 2.2)."""
    warmup_factor: Probability | None = None
    """Of the peak, where a gradual warm-up begins (default 0) and a constant one stays (default 0.1)."""
    cooldown: Duration = "0%"
    """In a line to min_lr over the last so many steps, from a constant or step schedule (Zhai et al., 2022, section 3.5)."""
    milestones: tuple[Duration, ...] = ()
    """Of schedule=step, from the beginning of the run: ["30 epochs", "60 epochs", "80 epochs"]."""
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    weight_decay_end: Annotated[float, Field(ge=0)] | None = 0.4
    """Cosine from weight_decay to this; null keeps it constant."""
    head_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of what is not the backbone; null: as the backbone's. A stronger one helps few-shot transfer (Zhai et al., 2022, 3.1)."""
    head_weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    """Cosine from head_weight_decay to this; null keeps it constant."""
    decay_all: bool = False
    """Decay biases and norms too; false leaves them alone (He et al., 2019, "Bag of Tricks", section 3.1)."""
    decoupled: bool | None = None
    """Weight decay shrinks the weights by lr * decay (Loshchilov & Hutter, 2019), or is an L2 term's gradient, which momentum
    and scaling see. null: as the optimizer's paper has it, that is decoupled for adamw and adafactor, L2 for sgd, lars and
    adabound; lamb adds it to the update that the trust ratio scales. adamw with false is Adam."""
    l1: Annotated[float, Field(ge=0)] = 0.0
    """Times sign(w), added to the clipped gradients of the weights that are decayed."""
    clip: Annotated[float, Field(gt=0)] | None = 3.0
    clip_mode: Literal["parameter", "global"] = "parameter"
    """Clip each parameter's gradient norm (DINO's code) or the norm over all."""
    momentum: Probability = 0.9
    """Of sgd and lars."""
    nesterov: bool = False
    """Of sgd and lars."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Of adamw, lamb, adabound; of adafactor its momentum, and the limit that the decay of its second moment grows to."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Not of adafactor, which adds 1e-30 to squared gradients."""
    momentum_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of adafactor (Zhai et al., 2022, section 3.4)."""
    final_lr: Annotated[float, Field(gt=0)] = 0.1
    """Of adabound: the rate of SGD that its bounds close on, at the peak; it follows the schedule as lr does."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        fixed = {"adafactor": True, "sgd": False, "lars": False}.get(self.name)
        if fixed is not None and self.decoupled not in (None, fixed):
            kind = "decoupled" if fixed else "L2"
            raise ValueError(f"decoupled={self.decoupled}: weight decay of {self.name} is {kind}; leave it out")
        if self.nesterov and not self.momentum and self.name in ("sgd", "lars"):
            raise ValueError("nesterov=true needs optimizer.momentum above 0, as in 0.9")
        if self.head_weight_decay_end is not None and self.head_weight_decay is None:
            raise ValueError("head_weight_decay_end needs optimizer.head_weight_decay, where it starts")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"schedule={self.schedule} with {len(self.milestones)} milestones: they go together, as in "
                "optimizer.schedule=step optimizer.milestones=['30 epochs','60 epochs']"
            )
        if parse_duration(self.cooldown)[0] and self.schedule in ("cosine", "linear"):
            raise ValueError(
                f"cooldown={self.cooldown!r}: schedule={self.schedule} comes down by itself; use schedule=constant or step"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and which stay."""

    every: Positive = 250
    """Steps."""
    keep_last: Positive = 2
    keep_every: Positive | None = None
    """Also keep, for good, those of steps divisible by this."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Also keep so many with the best top-1, of what tells classes or else of the k-NN; evaluations then end with a save.
    Needs eval.every."""


class EvalConfig(Section):
    """Labelled data for evaluation during and after training."""

    every: Positive | None = None
    """k-NN every so many steps; null: only when asked for."""
    train: str | None = None
    val: str | None = None
    k: tuple[Positive, ...] = (20,)
    temperature: Annotated[float, Field(gt=0)] = 0.07
    max_train: Positive | None = 20_000
    """At most this many bank images in evaluations during training (a seeded choice)."""
    as_jobs: bool = False
    """Evaluations of `every` run as separate jobs beside the training, where it was submitted; figures in RUN/eval/step_*."""


class EarlyStopConfig(Section):
    """Ending a run whose evaluations get no better (Prechelt, 1998)."""

    patience: Positive | None = None
    """So many evaluations in a row without a new best end the run, as done; null: none does. Needs eval.every."""
    metric: str | None = None
    """A figure of the evaluations; null: top1 where something tells classes, else knn_top1."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller is better."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A new best is better by more than this."""


class InitConfig(Section):
    """Starting from a run or a published checkpoint."""

    path: str | None = None
    heads: Literal["load", "fresh"] = "fresh"
    head_only: Duration | None = None
    """Train the heads alone for this long at first."""


class SpikeConfig(Section):
    """What to do about a loss that jumps: go back to the last checkpoint and leave the batch out (PaLM, section 5.1)."""

    factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above so many times the median of the last `window` steps is a spike; null: none is."""
    window: Annotated[int, Field(ge=8)] = 64
    """Steps."""
    skip: Positive = 1
    """Batches left out: the spiking one and those before it, as far as the checkpoint does not hold them."""
    max_rollbacks: Positive = 3
    """Stop at one more."""
