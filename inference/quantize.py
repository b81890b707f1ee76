"""INT8 after training (NNCF), kept only where it costs no more accuracy than it may.

    quantize(Path("model.xml"), Path("model_int8.xml"), like, images, validate, max_drop=0.005)

Weights and activations of the layers become 8-bit integers, their ranges measured on images (weights use
7 of the 8 bits, see below); SmoothQuant (Xiao et al., ICML 2023) moves the outliers of a transformer's
activations into its weights first. Where the score drops too far, the layers that cost most are brought back
to floating point, one after the other.
"""
import logging

from config import InputError
from inference.backends import (INSTALL, METADATA, ExportedModel, OpenVino, first_line, import_openvino,
                                keep_private, onnx_session)

ROUNDS, RANKED = 8, 4  # layers that are brought back at most, images on which they are ranked


def import_nncf():
    """Import NNCF. Raises InputError where it is not installed."""
    keep_private()
    try:
        import nncf
    except ImportError:
        raise InputError(INSTALL.format("NNCF, which --int8 needs,", "nncf")) from None
    nncf.set_log_level(logging.ERROR)
    return nncf


class Running(ExportedModel):
    """A model that NNCF hands over to be scored: `run` of a function, else as the exported model `like`."""

    def __init__(self, like, run):
        super().__init__(like.size, like.batch)
        self.run, self.num_classes, self.name = run, like.num_classes, "INT8"


def quantize(path, target, text, like, images, validate, max_drop):
    """Write an INT8 version of an exported file (.xml, .onnx) to `target`, with metadata `text`.

    like: the ExportedModel of the file; images: [(B, 3, H, W) uint8 numpy] to measure ranges on, as it takes
    them; validate(ExportedModel) -> score, of which `max_drop` may be lost: layers are brought back, at most
    ROUNDS of them, until that is so. Raises InputError where NNCF is missing or fails.
    """
    nncf = import_nncf()
    if path.suffix == OpenVino.ending:
        ov = import_openvino()
        model, names = ov.Core().read_model(str(path)), None

        def runner(compiled):
            return lambda part: compiled([part])[0]
    else:
        import onnx
        model, names = onnx.load(str(path)), "images"

        def runner(proto):
            session = onnx_session(proto.SerializeToString())
            return lambda part: session.run(None, {names: part})[0]

    def score(running, _):
        return validate(Running(like, runner(running))), None

    # weights of 7 bits: processors without VNNI add 8 bit products in 16 bits, which run over
    safe = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    restorer = nncf.AdvancedAccuracyRestorerParameters(max_num_iterations=ROUNDS, ranking_subset_size=RANKED)
    try:
        found = nncf.quantize_with_accuracy_control(
            model, nncf.Dataset(images, lambda part: {names: part} if names else part),
            nncf.Dataset(images[:1], lambda part: {names: part} if names else part), score,
            max_drop=max_drop, drop_type=nncf.DropType.ABSOLUTE, subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER, advanced_quantization_parameters=safe,
            advanced_accuracy_restorer_parameters=restorer)
    except InputError:
        raise
    except Exception as error:  # of three packages
        raise InputError(f"NNCF cannot quantize {path.name} ({first_line(error)}): export it without --int8"
                         ) from None
    if names:
        next(entry for entry in found.metadata_props if entry.key == METADATA).value = text
        onnx.save(found, str(target))
    else:
        found.set_rt_info(text, [METADATA])
        ov.save_model(found, str(target), compress_to_fp16=False)
