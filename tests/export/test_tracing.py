"""What is traced side by side is what each module is by itself."""

from bdtool.models.parts import network_spec, part_modules
from export.onnx_model import OnnxExporter, fold_batch_norm
from export.tracing import traced


def test_models_do_not_depend_on_what_is_traced_beside_them(random_model):
    model = random_model("resnet8", policy_hidden=8)
    network, modules = network_spec(model), part_modules(model)
    found = [(fold_batch_norm(modules[part.name]), part) for part in network.parts]
    together = traced(found)
    for name in ("policy", "shortcut_01", "head"):
        index = [part.name for part in network.parts].index(name)
        [alone] = traced([found[index]])
        weights = found[index][0].state_dict()
        for made in (alone, together[index]):
            for tensor in made.graph.initializer:
                if tensor.name in weights:  # they are random, and put in later
                    tensor.ClearField("raw_data")
        assert alone == together[index], name
        assert not alone.producer_version, "it would be another part for another version of PyTorch"
        for node in alone.graph.node:
            assert node.op_type != "Conv" or "kernel_shape" in {attribute.name for attribute in node.attribute}


def test_all_structures_are_traced_at_once(random_model, monkeypatch):
    model = random_model("resnet14")
    network, modules = network_spec(model), part_modules(model)
    calls = []

    def counted(found):
        calls.append([part.name for _, part in found])
        return traced(found)

    monkeypatch.setattr("export.onnx_model.traced", counted)
    exporter = OnnxExporter((fold_batch_norm(modules[part.name]), part) for part in network.parts)
    assert not calls, "before a part is asked for: an interrupted run may have left them all"
    for part in network.parts:
        exporter.onnx_from_module(fold_batch_norm(modules[part.name]), part)
    assert len(calls) == 1
    assert "block_00" in calls[0]
    assert "block_01" not in calls[0], "it has the structure of block 0"
