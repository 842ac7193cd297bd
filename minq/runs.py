"""A trained run, opened again: its model and the data that it was trained on."""
from minq.data import open_data
from minq.model import from_checkpoint
from minq.training import load_checkpoint, require_same_data


def open_run(folder, device, data_source=None):
    """(checkpoint, model in evaluation mode, data) of a run.

    `data_source`: where its data is now (`--data`). Without it the data must be what the run was
    trained on; UserError if it has changed, or if the run cannot be read.
    """
    checkpoint = load_checkpoint(folder)
    model = from_checkpoint(checkpoint, folder).to(device).eval()
    data = open_data(checkpoint["family"], checkpoint["args"] | ({"data": data_source} if data_source else {}))
    if not data_source:
        require_same_data(checkpoint["args"]["data"], data.sha256, checkpoint)
    return checkpoint, model, data
