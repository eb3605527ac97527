"""PaddingFreeConfig: the fields of a trainer that computes next to nothing on padding, and their refusals."""

from dataclasses import dataclass, field

from trl import GRPOConfig


@dataclass
class PaddingFreeConfig(GRPOConfig):
    """GRPOConfig with the fields of [`~luffy_trl.padding.mixin.PaddingFreeMixin`].

    Raises:
        ValueError: at construction, for fields that would miss the rows that are left out, or whose loss is not the
            same in other micro-batches.
    """

    trim_padding: bool | None = field(
        default=True,
        metadata={
            "help": "Order rows by length within each optimizer step and cut every micro-batch to its own longest "
            "row, where TRL pads all to the longest of a generation. Default: True."
        },
    )
    tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Deal the rows of each optimizer step anew, into as few micro-batches as hold at most this many "
            "tokens each: padding counts where rows are padded, a shared prompt once. per_device_train_batch_size and "
            "gradient_accumulation_steps then say only how many rows a step has; its loss does not change. A longer "
            "row has a micro-batch to itself. Rows are packed then with 'sdpa' attention, too. Default None: TRL's "
            "micro-batches."
        },
    )
    packed_forward: bool | None = field(
        default=None,
        metadata={
            "help": "Run each micro-batch as one row of sequences without padding. Needs layers that keep packed "
            "sequences apart, which is tried on two short ones before the first packed row. Default: on with flash "
            "and flex attention, and with 'sdpa' where tokens_per_micro_batch is set; off elsewhere, where it would "
            "be slower, and where it would not equal padded rows; True is refused there."
        },
    )
    share_prompts: bool | None = field(
        default=None,
        metadata={
            "help": "Run the prompt of a group once for all its rows in a micro-batch. Needs tokens_per_micro_batch, "
            "which keeps groups together, packed rows, 'sdpa' or 'flex_attention', and layers of attention only. "
            "Default: where it can be and leaves out enough of a step's tokens, as short prompts do not; True: "
            "always, and refused where it cannot be; False: each row has its own."
        },
    )
    skip_zero_advantages: bool = field(
        default=False,
        metadata={
            "help": "Leave rows without an advantage out of the forward and backward pass: they add nothing to the "
            "gradient. (Demonstrations under a loss that needs no advantage stay.) Token metrics (entropy, prob) are "
            "then means over the other rows. Not with beta > 0, an entropy bonus, top_entropy_quantile < 1 or 'bnpo', "
            "which use these rows. Default: False."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.skip_zero_advantages:
            self._check_nobody_misses_rows()
        if self.tokens_per_micro_batch is not None:
            self._check_rows_can_be_dealt(self.tokens_per_micro_batch)
        if self.share_prompts:
            self._check_prompts_can_be_shared()

    def _check_nobody_misses_rows(self):
        needed_by = {
            "beta": self.beta != 0,
            "entropy_coef": self.entropy_coef != 0,
            "use_adaptive_entropy": self.use_adaptive_entropy,
            "top_entropy_quantile": self.top_entropy_quantile < 1,
            "loss_type": self.loss_type == "bnpo",
            "trim_padding": not self.trim_padding,
        }
        for name, needed in needed_by.items():
            if needed:
                raise ValueError(
                    f"skip_zero_advantages=True cannot be combined with {name}={getattr(self, name)!r}: rows without "
                    "an advantage would be missed there."
                )

    def _check_prompts_can_be_shared(self):
        if self.tokens_per_micro_batch is None:
            raise ValueError(
                "share_prompts=True needs tokens_per_micro_batch, which puts the rows of a group into the same "
                "micro-batch. Set it to a number of tokens."
            )
        if self.packed_forward is False:
            raise ValueError(
                "share_prompts=True cannot be combined with packed_forward=False: rows share a prompt in a packed row "
                "only. Leave one of them out."
            )

    def _check_rows_can_be_dealt(self, budget: int):
        if budget < 1:
            raise ValueError(f"tokens_per_micro_batch={budget} must be 1 or more.")
        if not self.trim_padding:
            raise ValueError(
                f"tokens_per_micro_batch={budget} cannot be combined with trim_padding={self.trim_padding}: rows that "
                "are dealt by length are cut to it. Leave trim_padding out."
            )
        if self.loss_type == "bnpo" and self.beta != 0:
            raise ValueError(
                f"tokens_per_micro_batch={budget} cannot be combined with loss_type='bnpo' and beta={self.beta}: the "
                "KL term is there a mean over the tokens of one of TRL's micro-batches. Take loss_type='dapo', whose "
                "mean is over all tokens, or leave tokens_per_micro_batch out."
            )
        per_step, per_generation = self.gradient_accumulation_steps, self.steps_per_generation
        if self.num_iterations > 1 and per_generation % per_step != 0 and per_step % per_generation != 0:
            raise ValueError(
                f"tokens_per_micro_batch={budget} cannot be combined with num_iterations={self.num_iterations}, "
                f"steps_per_generation={per_generation} and gradient_accumulation_steps={per_step}: each iteration "
                "cuts a generation into other optimizer steps. Make steps_per_generation a multiple of "
                "gradient_accumulation_steps."
            )
