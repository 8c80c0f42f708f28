"""Routers of a frozen language model learn the plans that a search has found: Dr.LLM.

    loss = mean over layers and sequences of  -alpha_y (1 - p_y)^gamma log p_y        focal loss
    alpha_y ~ (1 - beta) / (1 - beta^n_y)                                             class-balanced weights

y is how often the plan of the sequence runs the layer, p the router's probabilities, and n_y how many labels
y there are. The alphas of the labels that occur add up to their number. While routers learn the network runs
the plan of each sequence, so that a router reads what it would read if those before it were right. Most
layers of most plans just execute: without weights a router that never skips has a small loss.

Routers read the prompt: the tokens before the first answer, but for the last, as in decoding.

Sources: Heakl et al., "Dr.LLM: Dynamic Layer Routing in LLMs", ICLR 2026, arXiv:2510.12773 (gamma = 2, beta =
0.999); Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; Cui et al., "Class-Balanced Loss Based
on Effective Number of Samples", CVPR 2019.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effjax.decoding.layer_router import ACTIONS, EXECUTE, REPEAT, SKIP
from effjax.errors import UsageError
from effjax.models.routed_lm import RoutedLM
from effjax.train.tasks.language import Language
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


def effective_weights(counts: Float[Array, " classes"], beta: float) -> Float[Array, " classes"]:
    """The weights of classes of so many samples, which add up to the number of classes that occur."""
    there = counts > 0
    grown = 1.0 - beta ** counts.astype(jnp.float32) if beta < 1.0 else counts
    raw = jnp.where(there, 1.0 / jnp.where(there, grown, 1.0), 0.0)
    return raw * jnp.sum(there) / jnp.maximum(jnp.sum(raw), jnp.finfo(jnp.float32).tiny)


def focal_loss(
    logits: Float[Array, "*shape classes"],
    labels: Int[Array, "*shape"],
    weights: Float[Array, " classes"],
    gamma: float,
) -> Float[Array, "*shape"]:
    """-w_y (1 - p_y)^gamma log p_y; with gamma = 0 weighted cross-entropy."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    log_p = jnp.sum(log_p * one_hot, axis=-1)
    return -jnp.take(weights, labels) * (1.0 - jnp.exp(log_p)) ** gamma * log_p


@dataclasses.dataclass(frozen=True)
class LayerRouting(Language):
    """Teaches routers how often to run each block for a sequence; the rest of the model stays.

    A batch is one of `Language`, in training with the plans of its sequences, `counts` `[B, L]`, and how many
    labels there are of each kind in all data, `labels` `[B, 3]`, the same in all rows:
    `experiments.layer_paths` writes them. In evaluation routers decide.

    Attributes:
      model: of which only the routers learn; freeze the rest by `optimizer.freeze`.
      gamma: how much less labels count that are known already.
      beta: of the effective number; 0 weighs all labels alike, and near 1 each as rare as it is.
      candidates: for batches without plans: how many are drawn for each step, the same for all sequences, of
        which a sequence learns the shortest that answers it.
    """

    model: RoutedLM
    gamma: float = 2.0
    beta: float = 0.999
    candidates: int = 0

    def __post_init__(self) -> None:
        if self.z_loss:
            raise UsageError("z_loss is of the frozen model's logits, which nothing changes: leave it out.")
        if self.gamma < 0:
            raise UsageError(f"gamma={self.gamma} must be 0 or more.")
        if not 0.0 <= self.beta <= 1.0:
            raise UsageError(f"beta={self.beta} must be between 0 and 1.")

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The focal loss, and how many decisions would have been right: in all, and of each rare kind."""
        variables = _only_routers(variables)
        if "counts" in batch:
            counts, known = batch["counts"], jnp.ones(batch["tokens"].shape[0], bool)  # [B, L], [B]
        elif self.candidates:
            counts, known = self._drawn(variables, batch, key)
        else:
            raise UsageError(
                "the batches have no field 'counts', the plans to learn: let experiments.layer_paths write "
                "them and read its folder as a source of kind 'arrays', or set task.candidates to draw plans."
            )
        _, route = self._along(variables, batch, counts, train=True)
        said, labels = jnp.swapaxes(route.logits, 0, 1), counts  # [B, L, 3], [B, L]
        weighed = jnp.broadcast_to(known[:, None], labels.shape).astype(jnp.float32)  # [B, L]
        if "labels" in batch:
            seen = batch["labels"][0].astype(jnp.float32)  # [3]
        else:
            seen = jnp.sum(jax.nn.one_hot(labels, len(ACTIONS)) * weighed[:, :, None], axis=(0, 1))  # [3]
        losses = focal_loss(said, labels, effective_weights(seen, self.beta), self.gamma)  # [B, L]
        right = jnp.argmax(said, axis=-1) == labels  # [B, L]
        means: dict[str, Mean] = {"loss": Mean.of(losses, weighed), "agreement": Mean.of(right, weighed)}
        for name, label in (("skips_found", SKIP), ("repeats_found", REPEAT)):
            means[name] = Mean.of(right, weighed * (labels == label))
        return means, {}

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """As `Language`; the share of sequences whose every answer is right, and how many layers they ran."""
        logits, route = self._along(variables, batch, None)
        means, _ = self._means(logits, batch, batch["weights"] * batch["mask"][:, None])
        layers = jnp.sum(route.counts, axis=0).astype(jnp.float32)  # [B]
        return {
            **means,
            "solved": Mean.of(solved(logits, batch), batch["mask"]),
            "layers": Mean.of(layers, batch["mask"]),
        }

    def answers(self, variables: Any, batch: Batch) -> Array:
        """The likeliest next token everywhere, `[B, N]`."""
        return jnp.argmax(self._along(variables, batch, None)[0], -1)

    def _along(
        self, variables: Any, batch: Batch, counts: Array | None, train: bool = False
    ) -> tuple[Array, Any]:
        reads = prompt_read(batch["weights"])
        told = batch["tokens"], counts, reads, batch["positions"], batch["segments"], train
        return self.model.apply(variables, *told, method="along")  # type: ignore[return-value]

    def _drawn(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Array, Array]:
        """For each sequence the shortest of a few plans that is right, and whether there is one."""
        depth, rows = self.model.depth, batch["tokens"].shape[0]
        of_share, of_plan, of_repeat = jax.random.split(key, 3)
        share = jax.random.uniform(of_share, (self.candidates, 1), maxval=0.5)  # [K, 1]
        skips = jax.random.uniform(of_plan, (self.candidates, depth)) < share  # [K, L]
        repeats = jax.random.bernoulli(of_repeat, 1 / (2 * depth), (self.candidates, depth))  # [K, L]
        plans = jnp.where(skips, SKIP, jnp.where(repeats, REPEAT, EXECUTE))
        plans = jnp.concatenate([jnp.full((1, depth), EXECUTE), plans])  # [1 + K, L]

        def right(plan: Array) -> Array:
            counts = jnp.broadcast_to(plan[None], (rows, depth))
            return solved(self._along(variables, batch, counts)[0], batch)

        known = jax.lax.map(right, plans)  # [1 + K, B]
        length = jnp.where(known, jnp.sum(plans, axis=1)[:, None], 2 * depth + 1)  # [1 + K, B]
        return plans[jnp.argmin(length, axis=0)], jnp.any(known, axis=0)


def prompt_read(weights: Float[Array, "b n"]) -> Int[Array, " b"]:
    """How many tokens of each row decide: those before the one whose target is the first answer.

    Decoding leaves the last token of a prompt to the loop. A row in which all is asked has no prompt: all of
    it is read.
    """
    first = jnp.argmax(weights > 0, axis=1)  # [B]
    return jnp.where(first > 0, first, weights.shape[1]).astype(jnp.int32)


def solved(logits: Float[Array, "b n vocab"], batch: Batch) -> Bool[Array, " b"]:
    """Whether every answer of a sequence is right."""
    right = jnp.argmax(logits, axis=-1) == batch["targets"]  # [B, N]
    return jnp.all(right | (batch["weights"] == 0), axis=1)


def _only_routers(variables: Any) -> Any:
    """The variables, of which only the routers' parameters are differentiated."""
    held: dict[str, Any] = jax.lax.stop_gradient(variables)
    params = held["params"]
    router = variables["params"]["blocks"]["router"]
    return {**held, "params": {**params, "blocks": {**params["blocks"], "router": router}}}
