"""The benchmarks' results: no run is lost, none is made twice."""

from measuring.results import Results, markdown_table


def test_a_torn_last_line_is_no_run_and_the_next_starts_afresh(tmp_path):
    results = Results("runs", tmp_path)
    results.append({"settings": {"x": 1}, "seconds": 2.0})
    with results.path.open("a") as file:
        file.write('{"settings": {"x": 2}, "sec')  # a process that died
    assert [run["settings"] for run in results.runs()] == [{"x": 1}]

    results.append({"settings": {"x": 3}, "seconds": 4.0})
    assert [run["settings"] for run in results.runs()] == [{"x": 1}, {"x": 3}]


def test_a_finished_run_is_not_made_again(tmp_path):
    made = []

    def run():
        made.append(len(made))
        return {"number": made[-1]}

    first = Results("runs", tmp_path).measure({"x": 1, "repeat": 0}, run)
    again = Results("runs", tmp_path).measure({"x": 1, "repeat": 0}, run)
    assert again == first
    assert made == [0]
    assert Results("runs", tmp_path).measure({"x": 1, "repeat": 1}, run)["number"] == 1


def test_a_table_in_markdown():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_run_with_more_settings_is_another_run(tmp_path):
    results = Results("runs", tmp_path)
    results.append({"settings": {"method": "lora_ga", "ga_offset": False}, "loss": 1})
    assert results.find({"method": "lora_ga"}) is None
    assert results.find({"ga_offset": False, "method": "lora_ga"})["loss"] == 1
