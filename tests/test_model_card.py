"""The card as others read it: the Hub's own parser for the front matter, a Markdown parser for the rest."""

import re
from html.parser import HTMLParser

import pytest

from sdr import SDRConfig, ftcn_released, tiny
from sdr.checkpoint import WeightsInfo
from sdr.evaluate import Group
from sdr.model_card import markdown, model_card
from sdr.terminal import SYNTHETIC_NOTE

huggingface_hub = pytest.importorskip("huggingface_hub")
markdown_it = pytest.importorskip("markdown_it")

METRICS = {"video AUC": 0.98765, "video accuracy": 1e-5, "video EER": 0.0625, "video AP": float("nan")}
GROUPS = [
    Group("celebdf", "all", 178, 340, METRICS, {"video AUC": (0.9712, 0.9951), "video EER": (0.04, 0.0888)}),
    Group("dfdc", "Deepfakes", 11, 12, {"video AUC": 0.5}, {}),
]
INFO = WeightsInfo(
    origin="trained by sdr train",
    metrics={"validation video AUC": 0.75, "validation threshold": 0.4321, "epochs run": 7.0},
    training={"lr": 1e-4, "model": {"num_branches": 4}, "init": None},
)
HOSTILE = (
    "\n---\nlicense: mit\n```\n# a | b <script>alert(1)</script> ![x](http://x) \"'\\ \udcff\u202e {name} & *b* $y$ `c`"
)


def card(**changes) -> str:
    arguments = {"name": "anna/sdr", "info": INFO, "config": tiny(), "groups": GROUPS, "data": "FaceForensics++ c23"}
    return model_card(**(arguments | changes))


class Page(HTMLParser):
    """Text of the elements of a rendered page, by tag; ``tables`` holds their rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(markdown_it.MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1]))

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.found.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.open.remove(tag)

    def handle_data(self, data):
        for tag in set(self.open):
            self.found[tag][-1] += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def test_the_hub_reads_the_front_matter():
    read = huggingface_hub.ModelCard(card(license="apache-2.0"))
    assert read.data.library_name == "sdr"
    assert read.data.license == "apache-2.0"
    assert read.data.model_name == "anna/sdr"
    assert "deepfake-detection" in read.data.tags
    assert "synthetic" not in read.data.tags
    found = [(r.dataset_name, r.metric_type, r.metric_name, r.metric_value) for r in read.data.eval_results]
    assert found == [
        ("celebdf, all fakes", "roc_auc", "video AUC", 0.98765),
        ("celebdf, all fakes", "accuracy", "video accuracy", 1e-5),  # a number, which YAML does not see in 1e-05
        ("celebdf, all fakes", "equal_error_rate", "video EER", 0.0625),
        ("dfdc, Deepfakes fakes", "roc_auc", "video AUC", 0.5),
        ("split that chose the weights", "roc_auc", "validation video AUC", 0.75),
    ]


def test_a_card_without_figures_has_no_model_index():
    read = huggingface_hub.ModelCard(model_card(name="m", info=WeightsInfo(), config=tiny()))
    assert read.data.eval_results is None
    assert read.data.license is None
    text = Page(read.content).found
    assert text["p"].count("None were recorded.") == 2
    assert {"Trained on: not recorded", "Where the weights come from: not recorded"} <= set(text["p"])


def test_tables_have_the_figures_and_no_others():
    page = Page(card())
    assert page.tables[0] == [
        ["dataset", "fakes", "real", "fake", "video AUC", "video accuracy", "video EER", "video AP"],
        ["celebdf", "all", "178", "340", "0.988 (0.971 to 0.995)", "0.000", "0.062 (0.040 to 0.089)", "undefined"],
        ["dfdc", "Deepfakes", "11", "12", "0.500", "undefined", "undefined", "undefined"],
    ]
    assert page.tables[1] == [
        ["metric", "value"],
        ["validation video AUC", "0.750"],
        ["validation threshold", "0.432"],
        ["epochs run", "7.000"],
    ]
    assert any("most accurate one was 0.432" in item for item in page.found["li"])
    # whatever else is a decimal is the default threshold, the paper's number and the learning rate
    rest = re.sub(r"\| .* \||most accurate one was 0\.432", "", card().split("\n---\n", 1)[1])
    assert set(re.findall(r"\d+\.\d+", rest)) == {"0.5", "2503.03270", "0.0001"}


def test_every_section_is_there():
    page = Page(card())
    assert page.found["h1"] == ["anna/sdr"]
    sections = ["Data", "Metrics", "Use", "Intended use", "Limits", "Training settings", "Citation"]
    assert page.found["h2"] == sections
    text = " ".join(" ".join(page.found["p"] + page.found["li"]).split())
    for phrase in (
        "Trained on: FaceForensics++ c23",
        "not a probability",
        "A person decides",
        "compression",
        "knows what it was trained on",
        "arXiv:2503.03270",
        "ICCV 2021",
        "32 consecutive frames of one followed face, aligned by one transform a clip, 64 x 64 pixels",
        "4 branches, each a temporal-only 3D ResNet to res3 (64 channels)",
    ):
        assert phrase in text
    python, shell, settings = page.found["code"][0], page.found["code"][2], page.found["code"][-1]
    assert python.splitlines()[-1] == 'model = SDRModel.from_pretrained("anna/sdr")'
    assert shell.startswith("hf download anna/sdr model.safetensors")
    assert settings.startswith('{\n  "lr": 0.0001,')


def test_names_the_class_that_loads_the_weights():
    released = ftcn_released().branch()
    assert "from sdr import FTCN\n" in card(config=released)
    assert "FTCN: a temporal-only 3D ResNet to res4 (1024 channels)" in card(config=released)
    assert "from sdr.fast import SDRModel\n" in card()
    assert "one branch" in card(config=SDRConfig(num_branches=1))
    assert "cannot see motion" in card(config=SDRConfig(temporal_kernels=False))
    assert "a 3D ResNet with kernels of 3 in space to res4" in card(config=SDRConfig(spatial_kernel=3))
    assert "hf download" not in card(name="run 1")


def test_synthetic_is_said_everywhere():
    info = WeightsInfo("x", synthetic=True, metrics=INFO.metrics)
    read = huggingface_hub.ModelCard(card(info=info))
    assert "synthetic" in read.data.tags
    assert all("nothing about real deepfakes" in entry.dataset_name for entry in read.data.eval_results)
    page = Page(read.content)
    assert SYNTHETIC_NOTE in " ".join(page.found["blockquote"][0].split())
    assert any(SYNTHETIC_NOTE in item for item in page.found["li"])
    assert SYNTHETIC_NOTE not in card()
    assert "blockquote" not in Page(card()).found


def test_hostile_texts_change_nothing_but_themselves():
    info = WeightsInfo(HOSTILE, metrics={HOSTILE: 0.5, f"validation {HOSTILE} AUC": 0.25}, training={HOSTILE: HOSTILE})
    group = Group(HOSTILE, HOSTILE, 1, 2, {HOSTILE: 0.5, "video AUC": 0.75}, {HOSTILE: (0.25, 0.75)})
    text = card(name=HOSTILE, info=info, groups=[group], data=HOSTILE, license=HOSTILE)
    text.encode()  # no lone surrogate is left
    read = huggingface_hub.ModelCard(text)
    shown = "\\n---\\nlicense: mit\\n```\\n# a | b"
    assert read.data.license.startswith(shown)
    assert read.data.model_name.startswith(shown)
    assert [entry.metric_value for entry in read.data.eval_results] == [0.75, 0.25]
    page, plain = Page(text), Page(card())
    assert {tag: len(found) for tag, found in page.found.items() if tag in ("h1", "h2", "pre", "table", "a")} == {
        tag: len(found) for tag, found in plain.found.items() if tag in ("h1", "h2", "pre", "table", "a")
    }
    assert not {"script", "img", "em", "hr"} & set(page.found)
    assert [len(row) for table in page.tables for row in table] == [6, 6, 2, 2, 2]
    assert page.found["h1"] == [printable(HOSTILE)]
    assert page.tables[0][1][0] == printable(HOSTILE)
    assert page.tables[0][1][4] == "0.500 (0.250 to 0.750)"


def printable(text: str) -> str:
    """Its signs, those that do not print as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def test_markdown_of_plain_words_is_plain():
    text = "trained by sdr train, seed 3: ffpp (c23), 4-fold!"
    assert markdown(text) == text
