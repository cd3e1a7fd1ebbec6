"""The method on a GPU: the CPU's results within rounding, every form of T, little room, recorded steps."""

from dataclasses import replace

import pytest
import torch
from golden_run import Recorder, calibration, exported, model, recipe
from networks import FAMILIES, family, images, searched

from metaaug_cli.augmentation.augmenter import Augmenter, AugmenterSpec
from metaaug_cli.graph.capture import export_program
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.pipeline import quantize
from metaaug_cli.quantization.graphed import GraphedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LEARNED = ["augmentation.kind=metaaug", "quantization.act_bits=2", "metaaug.steps=6", "metaaug.base_width=16"]
LEARNED += ["metaaug.batch_size=8", "metaaug.val_batch_size=8", "metaaug.warmup_steps=250"]


def run(*settings, device="cuda", **options):
    return quantize(exported(), calibration(), recipe=recipe(*settings), device=device, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compute_the_same_on_both(name):
    here, there = searched(family(name)), searched(family(name)).to(torch.device("cuda"))
    values: tuple[torch.Tensor, ...] = (images(4),)
    with torch.no_grad():
        for block, other in zip(here.blocks, there.blocks, strict=True):
            moved = tuple(v.cuda() for v in values)
            for kind in ("float_block", "quantized_block"):
                expected, found = getattr(block, kind)(*values), getattr(other, kind)(*moved)
                for a, b in zip(found, expected, strict=True):
                    # A code on a border may fall on its other side: a step of the grid, but rarely.
                    far = (a.cpu() - b).abs() > 1e-2 * b.abs().max()
                    assert far.float().mean() < 0.02, (block.name, kind)
            values = expected
        assert torch.isfinite(here.module(images(4))).all(), "the network itself stays where it was"


@pytest.mark.parametrize("start", ["nearest", "second-order"])
def test_learning_reaches_the_cpus_losses(start):
    settings = ("reconstruction.iterations=100", f"reconstruction.start={start}")
    results = [run(*settings, device=device) for device in ("cpu", "cuda")]
    cpu, gpu = ([(h.loss_before, h.loss_after) for h in r.histories] for r in results)
    assert gpu[0][0] == pytest.approx(cpu[0][0], rel=0.02), "before anything random happened"
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours == pytest.approx(theirs, rel=0.4)
    if start == "nearest":  # from second-order rounding so few iterations have little left to learn
        assert max(h.loss_after / h.loss_before for h in results[1].histories[1:-1]) < 0.9
    x = calibration().images
    same = results[1].deployed(x).argmax(1) == results[0].deployed(x).argmax(1)
    assert float(same.float().mean()) > 0.8


@pytest.mark.parametrize("form", ["unet", "residual", "policy"])
def test_every_form_of_the_augmenter_runs_and_resumes(form, tmp_path):
    settings = [*LEARNED, f"metaaug.form={form}", "calibration.holdout=8"]

    class Interrupt(Recorder):
        def step(self, block, done, total):
            if (block.index, done) == (2, 4):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(*settings, run_dir=tmp_path / "run", progress=Interrupt())
    result = run(*settings, run_dir=tmp_path / "run", resume=True)
    whole = run(*settings)
    for history, other in zip(result.histories, whole.histories, strict=True):
        assert history.loss_after == pytest.approx(other.loss_after, rel=0.5)
    assert result.metrics["peak_gpu_memory_mib"] > 0


@pytest.mark.parametrize("cache_gb", [0, 1e-5])
@pytest.mark.parametrize("augment", ["none", "flip+crop"])
def test_activations_in_host_memory_or_recomputed_give_the_same(cache_gb, augment):
    settings = ["reconstruction.iterations=30", f"augmentation.kind={augment}"]
    roomy, tight = run(*settings), run(*settings, cache_gb=cache_gb)
    for a, b in zip(roomy.histories, tight.histories, strict=True):
        assert b.loss_after == pytest.approx(a.loss_after, rel=0.3)


def test_learned_copies_reach_the_gpu_from_host_memory(monkeypatch):
    import metaaug_cli.pipeline as pipeline

    budget = pipeline.default_budget
    monkeypatch.setattr(
        pipeline, "default_budget", lambda *a: replace(budget(*a), device_bytes=0, host_bytes=2**30)
    )
    assert run(*LEARNED, "metaaug.form=policy").histories[2].loss_after > 0


def test_images_made_beside_the_real_ones_are_made_on_the_gpu():
    settings = ["calibration.synthetic=8", "reconstruction.iterations=10"]
    original = model()  # with its batch norms
    result = quantize(original, calibration(), recipe=recipe(*settings), device="cuda")
    assert len(result.histories) == 5


def test_the_gpus_random_numbers_are_the_callers_own():
    torch.cuda.manual_seed(3)
    wanted = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    Augmenter(AugmenterSpec(base_width=4), Preprocessing((8, 8), None, "bilinear", (0.5,) * 3, (0.5,) * 3),
              (8, 8), 1.0, seed=0)  # fmt: skip
    assert torch.equal(torch.rand(4, device="cuda"), wanted)


def test_a_recorded_step_does_what_the_plain_one_does():
    def walk(graphed):
        generator = torch.Generator(device="cuda").manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(8, 8, device="cuda"))
        optimizer = torch.optim.Adam(
            [weight], lr=torch.tensor(1e-2, device="cuda"), capturable=True, fused=True
        )

        def step(inputs):
            noise = torch.rand(inputs[0].shape, generator=generator, device="cuda")
            loss = ((inputs[0] + noise) @ weight).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        taken = GraphedStep(step, [generator]) if graphed else step
        batches = images(10, (8, 8)).cuda()
        losses = [float(taken([x])) for x in batches]
        return losses, weight.detach().cpu(), taken

    plain, recorded = walk(graphed=False), walk(graphed=True)
    assert recorded[2].graph is not None
    assert recorded[0] == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(recorded[1], plain[1], rtol=1e-5, atol=1e-6)


def test_a_step_that_waits_for_the_gpu_goes_on_unrecorded(caplog, monkeypatch):
    monkeypatch.setattr(GraphedStep, "possible", True)
    generator = torch.Generator(device="cuda").manual_seed(0)

    def step(inputs):
        assert float(inputs[0].sum()) == float(inputs[0].sum())
        return inputs[0] + torch.rand(3, generator=generator, device="cuda")

    taken = GraphedStep(step, [generator])
    found = [taken([torch.full((3,), float(i), device="cuda")]).cpu() - i for i in range(8)]
    assert taken.graph is None
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(2, device="cuda").sum() > 0, "the default generator is as usable as before"
    assert GraphedStep.possible is False, "no other step tries again"
    assert sum("cannot be recorded" in r.message for r in caplog.records) == 1
    again = torch.Generator(device="cuda").manual_seed(0)
    expected = [torch.rand(3, generator=again, device="cuda").cpu() for _ in range(8)]
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_recorded_steps_learn_what_plain_ones_learn(monkeypatch):
    settings = ["reconstruction.iterations=60"]
    recorded = run(*settings)
    monkeypatch.setattr(GraphedStep, "__call__", lambda self, inputs: self.step(inputs))
    plain = run(*settings)
    for a, b in zip(recorded.histories, plain.histories, strict=True):
        assert a.loss_after == pytest.approx(b.loss_after, rel=0.2)


def test_a_program_that_names_the_cpu_runs():
    """The tests above trace in this process; a network that names a device comes from outside."""

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)

        def forward(self, x):
            grid = torch.arange(6, device=x.device, dtype=x.dtype).view(1, 1, 1, 6)
            return self.last((torch.relu(self.first(x)) + grid).mean([2, 3]))

    program = export_program(Named().eval(), (3, 8, 8))
    named = replace(model(), module=program)
    assert quantize(
        named, calibration(), recipe=recipe("reconstruction.iterations=8"), device="cuda"
    ).histories
