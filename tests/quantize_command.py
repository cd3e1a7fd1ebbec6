"""``metaaug quantize`` on the demo's network and digits, as several tests run it."""

from metaaug_cli import demo

LEARNED = [
    *("--augment", "metaaug", "--holdout", "8", "--iterations", "2"),
    *("--set", "metaaug.steps=2", "--set", "metaaug.base_width=4", "--set", "metaaug.form=residual"),
]


def command(digits, *extra, out=None):
    """Arguments of a short run; the model's preprocessing is not in its file."""
    arguments = ["quantize", f"{digits / demo.MODEL}:digits_cnn", "--weights", str(digits / demo.WEIGHTS)]
    arguments += ["--calib", str(digits / "calib"), "--size", "8"]
    arguments += ["--mean", str(demo.MEAN), "--std", str(demo.STD), "--device", "cpu"]
    arguments += ["--wbits", "4", "--abits", "4", "--iterations", "8", "--batch", "8", *extra]
    return [*arguments, "--out", str(out)] if out else arguments


def flat(text):
    return " ".join(text.split())
