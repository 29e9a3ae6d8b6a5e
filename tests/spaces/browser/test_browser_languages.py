import json
import re
from pathlib import Path

LANGUAGES = Path(__file__).parents[3] / "spaces" / "browser" / "languages"


def test_every_language_says_everything():
    texts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in LANGUAGES.glob("*.json")}
    assert set(texts) == {"de", "en", "es", "fr", "ja", "zh"}
    for language in texts.values():
        assert language.keys() == texts["en"].keys()
        for key, text in language.items():
            assert text and set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", texts["en"][key]))
