//! What sglangd writes for the engine, proved on the installed SGLang: its PyYAML, its merger of
//! `--config`, its parser. `SGLANGD_TEST_VENV` names a virtual environment with SGLang in it.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use sglangd::config::{Config, Flag, FlagValue};
use sglangd::engine::flags::{FlagTable, Takes};
use sglangd::engine::inspect::{How, cached_table, installed_table};
use sglangd::engine::resolve::{YamlValue, resolve};
use sglangd::engine::yaml::render;

const WORDS: usize = 1500;
const TRAPS: &[&str] = &[
    "",
    " ",
    "~",
    "null",
    "Null",
    "NULL",
    "no",
    "No",
    "off",
    "OFF",
    "yes",
    "on",
    "true",
    "false",
    "True",
    "y",
    "n",
    "012",
    "08",
    "0o17",
    "0x10",
    "0b1",
    "12:30:45",
    "12:30",
    "1_000",
    "1e3",
    "1e-3",
    "1.10",
    ".inf",
    ".nan",
    "=",
    "<<",
    "-",
    "--",
    "---",
    "...",
    "--x",
    "-x",
    "- x",
    "? x",
    ": x",
    "a: b",
    "a #b",
    "#",
    "&a",
    "*a",
    "!a",
    "!!int 3",
    "|",
    ">",
    "%x",
    "@x",
    "`x`",
    "'",
    "\"",
    "\\",
    "\\n",
    "{a: 1}",
    "[1, 2]",
    "{}",
    "[]",
    ",",
    "2026-11-23",
    "2026-11-23 10:00:00",
    "\n",
    "a\nb",
    "\t",
    "\r\n",
    "a\r",
    "\u{85}",
    "\u{a0}",
    "\u{2028}",
    "\u{feff}",
    "\u{7f}",
    "\u{1b}[31m",
    "é",
    "日本",
    "\u{1f600}",
    "\u{10ffff}",
    "\u{fffe}",
    "{\"a\": [1, \"b\"]}",
    "x ",
    " x",
];

fn python() -> PathBuf {
    let venv =
        std::env::var_os("SGLANGD_TEST_VENV").expect("SGLANGD_TEST_VENV names a virtual environment with SGLang");
    PathBuf::from(venv).join("bin/python")
}

fn ask(question: &Value) -> Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/yaml_proof/proof.py");
    let mut child = Command::new(python())
        .arg(script)
        .env("SGLANG_USE_CPU_ENGINE", "1")
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(question.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the proof's Python ended with {}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

fn nasty_words() -> Vec<String> {
    let mut runner = TestRunner::deterministic();
    let any = "\\PC{0,12}|[ -~]{0,12}|[0-9_:.eExXo+-]{1,8}|[ \\t\\n\\r:#'\"\\\\-]{1,6}".prop_map(String::from);
    let random = (0..WORDS).map(|_| any.new_tree(&mut runner).unwrap().current());
    TRAPS.iter().map(|&word| word.to_owned()).chain(random).filter(|word| !word.contains('\0')).collect()
}

#[test]
#[ignore = "heavy: needs SGLANGD_TEST_VENV"]
fn i04_every_word_reaches_the_engines_parser_as_it_was_written() {
    let words = nasty_words();
    let mut files: Vec<String> =
        words.iter().map(|word| render(&[("tool-server".to_owned(), YamlValue::Word(word.clone()))])).collect();
    files.push(render(&[("custom-weight-loader".to_owned(), YamlValue::Words(words.clone()))]));
    files.push(render(&[("enable-metrics".to_owned(), YamlValue::True)]));
    files.push(render(&[]));
    let answer = ask(&json!({"files": files, "parse": []}));
    for (nth, word) in words.iter().enumerate() {
        assert_eq!(answer["loaded"][nth], json!({"tool-server": word}), "PyYAML reads {word:?}");
        assert_eq!(answer["tokens"][nth], json!(["--tool-server", word]), "the merger passes {word:?}");
    }
    let list: Vec<&str> = std::iter::once("--custom-weight-loader").chain(words.iter().map(String::as_str)).collect();
    assert_eq!(answer["tokens"][words.len()], json!(list));
    assert_eq!(answer["tokens"][words.len() + 1], json!(["--enable-metrics"]));
    assert_eq!(answer["tokens"][words.len() + 2], json!([]));
}

#[test]
#[ignore = "heavy: needs SGLANGD_TEST_VENV"]
fn i05_the_engines_parser_makes_of_our_file_what_was_meant() {
    let mut config = Config::shipped();
    let said = |name: &str, value: FlagValue| Flag { name: name.to_owned(), value, origin: "test".to_owned() };
    let word = |text: &str| FlagValue::Word(text.to_owned());
    config.engine.flags.0.extend([
        said("cuda-graph-bs-decode", FlagValue::Words(vec!["1".into(), "2".into()])),
        said("json-model-override-args", FlagValue::Json(json!({"a": {"b": [1, "012", true]}}))),
        said("tool-server", word("--x y")),
        said("preferred-sampling-params", FlagValue::Json(json!({"n": "no"}))),
        said("random-seed", word("-1")),
        said("dllm-fdfo", FlagValue::Off),
        said("enable-tf32-matmul", FlagValue::On),
        said("lora-paths", FlagValue::Words(vec!["a=/x".into(), r#"{"lora_name":"b","lora_path":"/y"}"#.into()])),
        said("chat-template", word("a\n'b': no")),
        said("disable-cuda-graph", FlagValue::On),
    ]);
    let resolved = resolve(&config, FlagTable::bundled()).unwrap();
    let argv: Vec<&str> = ["--model-path", "x"].into_iter().chain(resolved.argv.iter().map(String::as_str)).collect();
    let answer = ask(&json!({"files": [], "parse": [[render(&resolved.yaml), argv]]}));
    insta::assert_json_snapshot!(answer["parsed"][0]);
}

#[test]
#[ignore = "heavy: needs SGLANGD_TEST_VENV"]
fn the_installed_parser_says_what_the_shipped_table_says_and_is_asked_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut engine = Config::shipped().engine;
    engine.command = vec![python().to_str().unwrap().to_owned(), "-m".into(), "sglang.launch_server".into()];
    let limit = Duration::from_mins(2);
    assert!(cached_table(&engine, folder.path()).is_none());
    let first = installed_table(&engine, folder.path(), limit).unwrap();
    assert_eq!((first.how, first.warning), (How::Asked, None));
    let again = installed_table(&engine, folder.path(), limit).unwrap();
    assert_eq!(again.how, How::Cached);
    assert!(cached_table(&engine, folder.path()).is_some());

    let bundled = FlagTable::bundled();
    assert_eq!(first.table.version, bundled.version);
    assert_eq!(first.table.flags().len(), bundled.flags().len());
    for flag in bundled.flags() {
        let theirs = first.table.find(&flag.name).unwrap_or_else(|| panic!("{} is missing", flag.name));
        assert_eq!(theirs.takes(), flag.takes(), "{}", flag.name);
        assert_eq!(theirs.yaml_supported, flag.yaml_supported, "{}", flag.name);
        let sorted = |spec: &sglangd::engine::flags::FlagSpec| {
            spec.choice_words().map(|mut words| {
                words.sort();
                words
            })
        };
        assert_eq!(sorted(theirs), sorted(flag), "{}", flag.name);
        if flag.takes() == Takes::One {
            assert_eq!(theirs.element_type, flag.element_type, "{}", flag.name);
        }
    }

    // The same engine by its script, whose first line names the Python.
    engine.command = vec![python().with_file_name("sglang").to_str().unwrap().to_owned(), "serve".into()];
    assert!(cached_table(&engine, folder.path()).is_some());
    // A parser that does not answer in time is a warning, not an error.
    let other = tempfile::tempdir().unwrap();
    let late = installed_table(&engine, other.path(), Duration::from_millis(50)).unwrap();
    assert_eq!(late.how, How::Bundled);
    assert!(late.warning.unwrap().contains("no answer within 50ms"));
}

#[test]
#[ignore = "heavy: needs SGLANGD_TEST_VENV"]
fn i05_plan_check_shows_the_engines_own_answer() {
    let folder = tempfile::tempdir().unwrap();
    let plan = |more: &[&str]| {
        let command = format!("engine.command=[{}, -m, sglang.launch_server]", python().display());
        let output = Command::new(env!("CARGO_BIN_EXE_sglangd"))
            .args(["plan", "--check", "--json", "--set", &command, "--state-dir"])
            .arg(folder.path())
            .args(more)
            .env("HOME", folder.path())
            .current_dir(folder.path())
            .output()
            .unwrap();
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), plan["check"].clone())
    };
    let (code, check) = plan(&[]);
    assert_eq!((code, &check["answer"]), (Some(0), &json!("accepted")));
    let settings = &check["settings"];
    assert_eq!(settings["cuda_graph_max_bs_decode"], json!(32));
    assert_eq!(settings["tp_size"], json!(8));
    assert_eq!(settings["api_key"], json!("[redacted]"));
    let (code, check) = plan(&["--set", "engine.unknown_flags=pass", "--", "--no-such-flag", "3"]);
    assert_eq!((code, &check["answer"]), (Some(65), &json!("refused")));
    assert_eq!(check["why"], json!("unrecognized arguments: --no-such-flag=3"));
}
