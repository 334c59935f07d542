"""Teachers: saving and loading, labels by name, a run that ends whole or leaves nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import bert_config, save_encoder, write_glue
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fastkd.cli import main
from fastkd.cli.config import read_options
from fastkd.data.glue import GLUE
from fastkd.training import trainer
from fastkd.training.output import check_output, new_folder
from fastkd.training.teacher import (
    MultiTaskEncoder,
    MultiTaskEncoderConfig,
    load_teacher,
    task_loss,
    train_teacher,
)

IDS = torch.tensor([[2, 4, 10, 3, 14, 3], [2, 7, 3, 10, 3, 0]])
BATCH = {
    "input_ids": IDS,
    "attention_mask": (IDS != 0).long(),
    "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]),
}


def multi_task(encoder=None, **options):
    torch.manual_seed(0)
    tasks = {"mnli": {"labels": GLUE["mnli"].label_names}, "stsb": {"labels": []}}
    return MultiTaskEncoder(MultiTaskEncoderConfig(encoder or bert_config(), tasks, **options)).eval()


def with_more_padding(batch):
    return {name: torch.nn.functional.pad(values, (0, 3)) for name, values in batch.items()}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_save_and_load(tmp_path, pooling):
    model = multi_task(pooling=pooling)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tasks == {
        "mnli": {"labels": ["entailment", "neutral", "contradiction"]},
        "stsb": {"labels": []},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (AutoModelForSequenceClassification.from_pretrained(tmp_path), load_teacher(tmp_path)):
        assert not loaded.training
        for task in ("mnli", "stsb"):
            assert torch.equal(loaded(**BATCH, task=task).logits, model(**BATCH, task=task).logits)


def test_loads_in_float32_whatever_was_saved(tmp_path):
    multi_task().bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_teacher(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(pooling):
    model = multi_task(pooling=pooling)
    plain, padded = model(**BATCH, task="mnli").logits, model(**with_more_padding(BATCH), task="mnli").logits
    torch.testing.assert_close(plain, padded)


def test_head_reads_the_named_state():
    for pooling in ("cls", "mean"):
        model = multi_task(pooling=pooling)
        outputs = model.encoder(**BATCH)
        mean = torch.stack([outputs.last_hidden_state[0].mean(0), outputs.last_hidden_state[1, :5].mean(0)])
        state = outputs.pooler_output if pooling == "cls" else mean
        torch.testing.assert_close(model(**BATCH, task="stsb").logits, model.heads["stsb"](state))


def test_losses():
    model = multi_task()
    classes, scores = torch.tensor([2, 0]), torch.tensor([4.5, 1.0])
    log_probs = model(**BATCH, task="mnli").logits.log_softmax(-1)
    expected = -(log_probs[0, 2] + log_probs[1, 0]) / 2
    torch.testing.assert_close(model(**BATCH, task="mnli", labels=classes).loss, expected)
    predicted = model(**BATCH, task="stsb").logits[:, 0]
    torch.testing.assert_close(model(**BATCH, task="stsb", labels=scores).loss, ((predicted - scores) ** 2).mean())
    assert task_loss(torch.zeros(2, 1, dtype=torch.bfloat16), scores).dtype == torch.float32


def test_task_must_be_known():
    with pytest.raises(ValueError, match="task is None; this model has heads for mnli, stsb"):
        multi_task()(**BATCH)
    with pytest.raises(ValueError, match="task is 'rte'"):
        multi_task()(**BATCH, task="rte")
    with pytest.raises(ValueError, match="pooling is 'max'"):
        multi_task(pooling="max")


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(
            vocab_size=16,
            type_vocab_size=1,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        DistilBertConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32),
    ],
)
def test_encoders_without_token_types(config, tmp_path):
    model = multi_task(config)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_teacher(tmp_path)(**BATCH, task="mnli").logits, model(**BATCH, task="mnli").logits)


def test_from_encoder_keeps_the_pretrained_weights(tmp_path):
    path = save_encoder(tmp_path)
    pretrained = AutoModel.from_pretrained(path).state_dict()
    for name, value in MultiTaskEncoder.from_encoder(path, ["sst2"]).encoder.state_dict().items():
        assert torch.equal(value, pretrained[name]), name


def classifier(folder, labels, cls=BertForSequenceClassification, config=bert_config):
    torch.manual_seed(0)
    options = {"num_labels": len(labels)}
    if labels[0] is not None:
        options = {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    model = cls(config(**options)).eval()
    model.save_pretrained(folder)
    return model


def test_single_task_labels_are_matched_by_name(tmp_path):
    model = classifier(tmp_path, ["CONTRADICTION", "Entailment", "neutral"])
    teacher = load_teacher(tmp_path, task="mnli")
    assert teacher.config.tasks == {"mnli": {"labels": ["entailment", "neutral", "contradiction"]}}
    expected = model(**BATCH).logits[:, [1, 2, 0]]
    assert torch.equal(teacher(**BATCH).logits, expected)
    assert torch.equal(teacher(**BATCH, task="mnli").logits, expected)
    labels = torch.tensor([2, 0])
    torch.testing.assert_close(
        teacher(**BATCH, labels=labels).loss, torch.nn.functional.cross_entropy(expected, labels)
    )
    with pytest.raises(ValueError, match="task is 'rte'; this teacher knows mnli alone"):
        teacher(**BATCH, task="rte")


def test_unnamed_labels_need_their_order(tmp_path):
    model = classifier(tmp_path, [None, None])
    with pytest.raises(ValueError, match=r"does not name its labels \(LABEL_0, LABEL_1\).*not_entailment"):
        load_teacher(tmp_path, task="rte")
    teacher = load_teacher(tmp_path, task="rte", label_names=["not_entailment", "entailment"])
    assert torch.equal(teacher(**BATCH).logits, model(**BATCH).logits[:, [1, 0]])
    with pytest.raises(ValueError, match="labelled yes, no; the labels of rte are"):
        load_teacher(tmp_path, task="rte", label_names=["yes", "no"])


def test_foreign_labels_are_refused(tmp_path):
    classifier(tmp_path, ["toxic", "neutral", "other"])
    with pytest.raises(ValueError, match="labelled toxic, neutral, other; the labels of mnli are entailment"):
        load_teacher(tmp_path, task="mnli")
    with pytest.raises(ValueError, match=r"3 outputs of the teacher.*the labels of sst2 are negative, positive"):
        load_teacher(tmp_path, task="sst2")
    with pytest.raises(ValueError, match="stsb is a regression; a teacher of it has one output, not 3"):
        load_teacher(tmp_path, task="stsb")
    with pytest.raises(ValueError, match="say which task"):
        load_teacher(tmp_path)


def test_single_task_regression_and_roberta(tmp_path):
    def config(**options):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return RobertaConfig(vocab_size=16, type_vocab_size=1, **sizes, **options)

    model = classifier(tmp_path, [None], RobertaForSequenceClassification, config)
    teacher = load_teacher(tmp_path, task="stsb")
    expected = model(BATCH["input_ids"], BATCH["attention_mask"]).logits
    assert torch.equal(teacher(**BATCH).logits, expected)


def test_a_multi_task_teacher_knows_its_tasks(tmp_path):
    multi_task().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leave out task and label_names"):
        load_teacher(tmp_path, task="mnli")


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def command(encoder, glue, output, *more):
    options = ["--model", encoder, "--data-dir", str(glue), "--output", str(output), "--max-length", "16"]
    return ["teacher", *options, "--no-bf16", "--tasks", "sst2,stsb", *more]


def test_command_trains_saves_and_reports(encoder, glue, tmp_path, capsys):
    output = tmp_path / "runs" / "teacher"
    more = ["--epochs", "25", "--learning-rate", "1e-2", "--batch-size", "8", "--pooling", "mean"]
    assert main(command(encoder, glue, output, *more)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sst2", "accuracy", "100.0"] in lines
    metrics = json.loads((output / "eval_results.json").read_text())
    assert ["average", f"{metrics['eval_average']:.1f}"] in lines
    assert metrics["eval_stsb_pearson"] > 0.9
    assert list(output.parent.iterdir()) == [output]
    assert not list(output.glob("*.bin"))
    assert read_options(output / "options.yaml").items() >= {"pooling": ["mean"], "bf16": ["false"]}.items()
    teacher = load_teacher(output)
    words = AutoTokenizer.from_pretrained(output)(["the great film", "the awful film"], return_tensors="pt")
    assert teacher(**words, task="sst2").logits.argmax(-1).tolist() == [1, 0]
    embeddings = load_file(output / "model.safetensors")["encoder.embeddings.word_embeddings.weight"]
    assert torch.equal(embeddings, teacher.encoder.embeddings.word_embeddings.weight)


def test_sampling_tau_reaches_the_sampler(encoder, glue, tmp_path, monkeypatch, capsys):
    taus = []
    sampler = trainer.MultiTaskBatchSampler
    monkeypatch.setattr(
        trainer, "MultiTaskBatchSampler", lambda *a, **options: taus.append(options["tau"]) or sampler(*a, **options)
    )
    assert main(command(encoder, glue, tmp_path / "one", "--epochs", "1", "--sampling-tau", "0.5")) == 0
    assert main(command(encoder, glue, tmp_path / "two", "--epochs", "1")) == 0
    assert taus == [0.5, None]
    assert main(command(encoder, glue, tmp_path / "bad", "--sampling-tau", "-1")) == 1
    assert "tau is -1.0; it must be a finite number >= 0" in capsys.readouterr().err


def test_same_seed_same_teacher(encoder, glue, tmp_path):
    for name in ("one", "two"):
        train_teacher(encoder, ["sst2"], tmp_path / name, data_dir=glue, max_length=16, bf16=False, num_train_epochs=1)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_leaves_nothing(encoder, glue, tmp_path, monkeypatch):
    def full_disk(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MultiTaskEncoder, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train_teacher(encoder, ["sst2"], tmp_path / "out", data_dir=glue, max_length=16, max_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_one_line(encoder, glue, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastkd.training.teacher.MultiTaskTrainer.train", interrupt)
    assert main(command(encoder, glue, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fastkd teacher: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_before_work(encoder, glue, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr("fastkd.training.teacher.MultiTaskTrainer", fail)
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(command(encoder, glue, tmp_path)) == 1
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert main(command(encoder, glue, tmp_path / "new", "--tasks", "sst2, sst5")) == 1
    assert "unknown task 'sst5'; the tasks are cola" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    assert main(command(encoder, glue, tmp_path / "new")) == 1
    assert "MB left" in capsys.readouterr().err
    (broken := tmp_path / "SST-2").mkdir()
    (broken / "train.tsv").write_text("sentence\tlabel\na\t3\n")
    assert main(command(encoder, tmp_path, tmp_path / "new", "--tasks", "sst2")) == 1
    assert "no file dev*" in capsys.readouterr().err
    (broken / "dev.tsv").write_text("sentence\tlabel\na\t1\n")
    assert main(command(encoder, tmp_path, tmp_path / "new", "--tasks", "sst2")) == 1
    assert "train.tsv, line 2: unknown label '3'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--learning-rate", "--max-train-rows"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_numbers_must_be_positive(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(command("none", tmp_path, tmp_path / "new", option, value))
    assert f"argument {option}: '{value}' must be a positive number" in capsys.readouterr().err


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_output(tmp_path / "file" / "inside")
    with pytest.raises(FileExistsError, match="holds something else"):
        check_output(tmp_path / "file")


def test_new_folder_is_whole_or_absent(tmp_path):
    with new_folder(tmp_path / "good") as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "good").exists()
    assert (tmp_path / "good" / "a").read_text() == "x"
    interrupted = new_folder(tmp_path / "bad")
    (interrupted.__enter__() / "a").write_text("x")
    assert not interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
