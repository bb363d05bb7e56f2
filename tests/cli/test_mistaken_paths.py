"""One thing where another is expected: the message says what was given, and what to give."""


def test_bundle_where_a_model_is_expected_names_the_model_in_it(bdtool, bundle_copy, npz, tmp_path):
    told = (
        f"'{bundle_copy}' is a BUNDLE, expected a MODEL file. It was exported from the one in it: '{bundle_copy}/weigh"
    )
    for words in (("export", bundle_copy, "-o", "b"), ("train", "finetune", bundle_copy, "--data", npz, "-o", "m")):
        assert told in bdtool(*words, status=2).stderr
    message = bdtool("export", tmp_path, "-o", "b", status=2).stderr
    assert f"'{tmp_path}' is a directory, expected a MODEL file (.safetensors)" in message


def test_file_where_a_bundle_is_expected_is_told_apart(bdtool, bundle_copy, picture):
    for file in (bundle_copy / "manifest.json", bundle_copy / "onnx" / "stem.onnx"):
        message = bdtool("build", file, status=2).stderr
        assert f"'{file}' is a file of the BUNDLE '{bundle_copy}'; give that directory" in message
    assert "give that directory" in bdtool("inspect", bundle_copy / "manifest.json", status=2).stderr
    message = bdtool("run", picture, bundle_copy, status=2).stderr
    assert (
        f"'{picture}' is a file, expected the directory of a BUNDLE, which `bdtool export` makes of a MODEL" in message
    )
    message = bdtool("build", bundle_copy.parent / "a b", status=2).stderr
    assert f"no such directory. `bdtool export MODEL -o '{bundle_copy.parent}/a b'` makes one" in message


def test_what_is_no_checkpoint_is_told(bdtool, bundle_copy, tmp_path):
    for given, told in (
        ("r32-cifar10", "'r32-cifar10' is a MODEL already, which ships with bdtool. Go on with it: bdtool export"),
        (bundle_copy, f"'{bundle_copy}' is a BUNDLE already, expected a checkpoint"),
        (tmp_path, f"{tmp_path} is a directory without model.safetensors or pytorch_model.bin"),
    ):
        message = bdtool("import", given, "--arch", "resnet8", "-o", tmp_path / "m", status=2).stderr
        assert told in message
        assert not (tmp_path / "m").exists()


def test_directory_of_images_shows_how_to_name_them(bdtool, tiny, tmp_path):
    message = bdtool("run", tiny.bundle, tmp_path, status=2).stderr
    assert f"is a directory, expected image files, for instance {tmp_path}/*.png" in message


def test_directory_of_validation_data_is_not_told_to_be_the_training_data(bdtool, tiny, npz, tmp_path):
    (tmp_path / "val").mkdir()
    npz.rename(tmp_path / "val" / "val.npz")
    words = ("train", "finetune", tiny.path, "--data", "synthetic", "--val", tmp_path / "val", "-o", tmp_path / "m")
    message = bdtool(*words, status=2).stderr
    assert f"it holds val.npz; pass the file itself: {tmp_path}/val/val.npz\n" in message
    assert "--data" not in message
