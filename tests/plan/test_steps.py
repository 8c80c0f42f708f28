import jax

from effjax.diffusion.samplers import EulerSampler
from effjax.plan import steps
from tests.train.toy import program_of


def test_a_model_is_sampled_with_what_it_is_told():
    program = program_of("configs.diffusion.e_mmdit")
    step = steps.sample(program, steps.Serving(batch=4, sampler=EulerSampler(2)))
    example = program.data.example_batch(1)
    assert step.arguments[1].shape == (4, *example["text"].shape[1:])
    drawn = jax.eval_shape(step.function, *step.arguments)
    assert drawn.shape == (4, *example["image"].shape[1:])
