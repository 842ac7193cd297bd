"""Put a run's model into docs/explore.html, whose last panel runs it in the reader's browser.

    python -m tests.explore zoo/opt-vanilla          an OPT on bytes, with a linear gate or without

The page gets the weights in int8 with a scale per row, the range of every tap in calibration, and
the dimensions in which the start token has an outlier: where an FFN writes values beyond 6
standard deviations of all other tokens' values. The ranges are there twice: with these outliers
kept, and set to 0. (The sentences beside the panel were written for zoo/opt-vanilla.)
"""
import base64
import json
import re
import sys
from pathlib import Path

import torch

from minq.outliers import listening
from minq.quant import ActivationQuantizer, quantize_model
from minq.runs import open_run

PAGE = Path(__file__).parent.parent / "docs" / "explore.html"


@torch.no_grad()
def page_with(folder):
    """The source of the page, with the model of the run in `folder`."""
    run, packed, outliers = open_run(folder, torch.device("cpu"), family="opt"), b"", {}
    for _, weight in run.model.named_parameters():  # of a vector, a row is a number
        rows = weight.view(len(weight), -1)
        scales = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)
        integers = (rows / scales).round().to(torch.int8)
        packed += scales.numpy().tobytes() + integers.numpy().tobytes()

    def find_outliers(tap, layer, x):  # (B, T, d)
        outliers[layer] = torch.where(x[:, 0].mean(0).abs() > 6 * x[:, 1:].std())[0].tolist()

    with listening(run.model, ("ffn_output",), find_outliers):
        run.model(*next(run.calibration_inputs(seed=0, batches=1)))
    model = {"run": run.name, "config": vars(run.model.config),
             "shapes": {name: weight.shape for name, weight in run.model.named_parameters()},
             "outliers": outliers, "kept": ranges(run, {}), "removed": ranges(run, outliers),
             "packed": base64.b64encode(packed).decode()}
    return re.sub(r'(?<=id="model">\n).*', json.dumps(model), PAGE.read_text())


def ranges(run, outliers):
    """Tap -> [lowest, highest] of a calibration in 16 bits, with these outliers set to 0."""
    model = quantize_model(run.model, a_bits=16, only="*_tap")
    for layer, dimensions in outliers.items():
        def remove(module, args, output, dimensions=dimensions):
            output[:, 0, dimensions] = 0.0
        model.layers[layer].ffn_down.register_forward_hook(remove)
    run.calibrate(model, seed=0, batches=16)
    return {name.removesuffix("_tap"): [tap.range.low.item(), tap.range.high.item()]
            for name, tap in model.named_modules() if isinstance(tap, ActivationQuantizer)}


if __name__ == "__main__":
    PAGE.write_text(page_with(sys.argv[1]))
