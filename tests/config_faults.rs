//! Group I of `docs/faults.md`: what may be wrong with a configuration, through the library's door.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sglangd::config::{
    Color, Config, ConfigError, FlagValue, Loaded, ModelSource, Needs, Sources, User, WhenMissing, load,
};
use sglangd::engine::flags::FlagTable;
use sglangd::engine::resolve::{YamlValue, resolve};

/// A machine of its own: a folder, an empty environment, nobody's home.
struct Machine {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cwd = folder.path().join("work");
        std::fs::create_dir(&cwd).unwrap();
        let home = folder.path().join("home");
        std::fs::create_dir(&home).unwrap();
        let sources = Sources {
            files: Vec::new(),
            set: Vec::new(),
            engine_flags: Vec::new(),
            env: BTreeMap::from([("HOME".into(), home.into_os_string())]),
            cwd,
            user: User::Other(1000),
            system_config: folder.path().join("etc/config.yaml"),
            missing: WhenMissing::BuiltIn,
            needs: Needs::Engine,
        };
        Self { folder, sources }
    }

    fn with(text: &str) -> Self {
        Self::new().file("config.yaml", text.as_bytes())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sources.cwd.join(name)
    }

    /// A file named by `--config`.
    fn file(mut self, name: &str, bytes: &[u8]) -> Self {
        std::fs::write(self.path(name), bytes).unwrap();
        self.sources.files.push(PathBuf::from(name));
        self
    }

    fn set(mut self, text: &str) -> Self {
        self.sources.set.push(text.to_owned());
        self
    }

    fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.sources.env.insert(name.into(), value.into());
        self
    }

    fn flags(mut self, words: &[&str]) -> Self {
        self.sources.engine_flags.extend(words.iter().map(|&word| word.to_owned()));
        self
    }

    fn load(&self) -> Result<Loaded, ConfigError> {
        load(&self.sources)
    }

    fn config(&self) -> Config {
        match self.load() {
            Ok(loaded) => loaded.config,
            Err(error) => panic!("{}", error.render(Color::Plain)),
        }
    }

    /// The rendering of what is wrong.
    fn refused(&self) -> String {
        match self.load() {
            Ok(loaded) => panic!("it was accepted: {:#?}", loaded.config),
            Err(error) => error.render(Color::Plain),
        }
    }
}

const MODEL: &str = "model:\n  repo: a/b\n";

#[test]
fn the_shipped_configuration_is_the_set_up_of_the_model_and_else_the_defaults() {
    let shipped = Machine::new().config();
    assert_eq!(shipped, Config::shipped());
    assert_eq!(
        shipped.model.source,
        ModelSource::Repo { repo: "deepseek-ai/DeepSeek-V4-Pro".into(), revision: "main".into() }
    );
    assert_eq!(shipped.engine.tp, 8);
    assert_eq!(shipped.engine.flags.0.len(), 16);
    assert_eq!(shipped.engine.env["CUDA_VISIBLE_DEVICES"], "0,1,2,3,4,5,6,7");
    let mut plain = Machine::with(MODEL).config();
    plain.model = shipped.model.clone();
    plain.engine = shipped.engine.clone();
    assert_eq!(plain, shipped);
    assert_eq!(shipped.shutdown.grace, Duration::from_secs(25));
    assert_eq!((shipped.limits.max, shipped.limits.target, shipped.limits.hold), (32, 10, Duration::ZERO));

    let resolved = resolve(&shipped, FlagTable::bundled()).unwrap();
    assert_eq!(resolved.argv, Vec::<String>::new());
    assert_eq!(resolved.log_level, "debug");
    assert!(resolved.yaml.contains(&("cuda-graph-max-bs-decode".into(), YamlValue::Word("32".into()))));
    assert!(resolved.yaml.contains(&("trust-remote-code".into(), YamlValue::True)));
    assert!(!resolved.yaml.iter().any(|(name, _)| name == "collect-tokens-histogram"));
    insta::assert_snapshot!(resolved.warnings.join("\n"));
}

// ---------------------------------------------------------------------- the binary

const BIN: &str = env!("CARGO_BIN_EXE_sglangd");

struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Machine {
    /// `sglangd plan` on this machine, with an engine that needs no Python.
    fn plan(&self, more: &[&str]) -> Ended {
        let mut command = self.command(Path::new(BIN));
        command.args(["--set", &format!("engine.command=[{BIN}, simulate]")]);
        ended(command.args(more))
    }

    fn command(&self, binary: &Path) -> std::process::Command {
        let mut command = std::process::Command::new(binary);
        command.env_clear().envs(&self.sources.env).env("PATH", "/usr/bin:/bin").current_dir(&self.sources.cwd);
        // `plan` asks the hub what there is; these tests reach for no network.
        command.env("HF_HUB_OFFLINE", "1");
        command.arg("plan").arg("--state-dir").arg(self.folder.path().join("state"));
        command.arg("--runtime-dir").arg(self.folder.path().join("run"));
        for file in &self.sources.files {
            command.arg("--config").arg(file);
        }
        for set in &self.sources.set {
            command.arg("--set").arg(set);
        }
        command
    }
}

fn ended(command: &mut std::process::Command) -> Ended {
    let output = command.output().unwrap();
    Ended {
        code: output.status.code().expect("not ended by a signal"),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// What the engine would get of these flags.
fn resolved(machine: &Machine) -> Result<sglangd::engine::resolve::Resolved, String> {
    let loaded = machine.load().map_err(|error| error.render(Color::Plain))?;
    resolve(&loaded.config, FlagTable::bundled()).map_err(|errors| errors.explain(&loaded).render(Color::Plain))
}

fn with_flags(flags: &str) -> Machine {
    let indented = flags.replace('\n', "\n    ");
    Machine::with(&format!("{MODEL}engine:\n  flags:\n    {indented}\n"))
}

fn word(text: &str) -> YamlValue {
    YamlValue::Word(text.to_owned())
}

// ---------------------------------------------------------------------- the rows

#[test]
fn i01_a_text_that_is_no_yaml_is_shown_with_line_column_and_caret() {
    let latin = [MODEL.as_bytes(), b"  name: caf\xe9\n"].concat();
    let cases: [(&str, &[u8]); 8] = [
        ("tab", b"model:\n\trepo: a/b\n"),
        ("unclosed quote", b"model:\n  repo: \"a/b\nlimits:\n  max: 3\n"),
        ("unclosed bracket", b"model:\n  repo: a/b\nengine:\n  command: [python3, -m\n"),
        ("NUL", b"model:\n  repo: a/b\0\n"),
        ("not UTF-8", &latin),
        ("colon", b"model:\n  repo: a: b\n"),
        ("indentation", b"model:\n  repo: a/b\n name: x\n"),
        ("two documents", b"model:\n  repo: a/b\n---\nmodel:\n"),
    ];
    let mut all = String::new();
    for (name, bytes) in cases {
        let machine = Machine::new().file("config.yaml", bytes);
        write!(all, "=== {name}\n{}", machine.refused()).unwrap();
        assert_eq!(machine.plan(&[]).code, 65, "{name}");
    }
    insta::assert_snapshot!(all);
}

#[test]
fn i01_a_file_larger_than_one_mib_is_not_read() {
    let mut text = MODEL.as_bytes().to_vec();
    text.resize(50 << 20, b'#');
    insta::assert_snapshot!(Machine::new().file("config.yaml", &text).refused());
}

#[test]
fn i02_an_unknown_key_or_flag_is_answered_with_did_you_mean() {
    let keys = Machine::with(
        "model:\n  repo: a/b\nlimts:\n  max: 3\nlimits:\n  maxx: 4\n  queue-timeout: 3\nengine:\n  grace: 3s\n  \
         mem-fraction-static: 0.5\nlimits.max: 3\n",
    );
    let flags = with_flags("mem-fraction-statik: 0.5\ntrust_remote_code: true\nmax-running: 3\nzzz: 1");
    let listed = format!("{}{}", keys.refused(), resolved(&flags).unwrap_err());
    insta::assert_snapshot!(listed);
    assert_eq!(flags.plan(&[]).code, 65);
    let set = Machine::with(MODEL).set("limits.maks=3").refused();
    assert!(set.contains("there is no key `limits.maks`") && set.contains("did you mean `limits.max`?"), "{set}");
}

#[test]
fn i02_a_flag_newer_than_the_table_passes_when_that_is_asked_for() {
    let machine = with_flags("brand-new: 3\nbrand-newer: true").set("engine.unknown_flags=pass");
    let resolved = resolved(&machine).unwrap();
    assert_eq!(resolved.argv, ["--brand-new=3", "--brand-newer"]);
    assert_eq!(resolved.warnings.len(), 2);
}

#[test]
fn i03_a_key_said_twice_is_refused_with_both_places() {
    let twice = "model:\n  repo: a/b\nlimits:\n  max: 3\n  max: 4\nengine:\n  flags:\n    tp-size: 1\n    tp-size: 2\n";
    insta::assert_snapshot!(Machine::with(twice).refused());
}

#[test]
fn i04_words_that_yaml_readers_disagree_about_stay_the_words_they_are() {
    let words = [
        "012",
        "08",
        "0o17",
        "0x10",
        "12:30:45",
        "12:30",
        "1_000",
        "1e3",
        "1e-3",
        "=",
        "y",
        "n",
        "no",
        "off",
        "Yes",
        "1.10",
        "2026-11-23",
        ".5",
        "+1",
        "0b1",
        ".inf",
        "<<",
        "1,000",
        "~x",
        "null0",
        "NULL ",
        "@x",
        "0.0",
    ];
    for said in words {
        let quoted = if said.starts_with(['@', '=', '<']) || said.ends_with(' ') {
            format!("'{said}'")
        } else {
            said.to_owned()
        };
        let resolved = resolved(&with_flags(&format!("tool-server: {quoted}"))).unwrap();
        assert_eq!(resolved.yaml, [("tool-server".to_owned(), word(said))], "{said}");
    }
    // Booleans of YAML 1.1 after a flag that takes no value are neither guessed nor passed on.
    for said in ["yes", "no", "on", "off", "1", "'true'", "\"false\""] {
        let refused = resolved(&with_flags(&format!("trust-remote-code: {said}"))).unwrap_err();
        assert!(refused.contains("takes no value") && refused.contains("config.yaml:5:5"), "{refused}");
    }
    // Nothing, `~` and `null` take a flag away: they never become the word `None`.
    for said in ["", "~", "null"] {
        assert_eq!(resolved(&with_flags(&format!("tool-server: {said}"))).unwrap().yaml, []);
    }
}

#[test]
fn i05_each_shape_of_a_flag_reaches_the_engine_as_meant_or_is_refused() {
    let flags = "trust-remote-code: false\nenable-metrics: true\ncuda-graph-bs-decode: [1, 2, 4]\n\
                 json-model-override-args:\n  a: {b: [1, 012, yes, true]}\ntool-server: --x\nchat-template: \"a\\nb\"\n\
                 random-seed: -1\nlora-paths: [a=/x, {lora_name: b, lora_path: /y}]\nenable-tf32-matmul: false";
    let resolved_flags = resolved(&with_flags(flags)).unwrap();
    assert_eq!(
        resolved_flags.yaml,
        [
            ("enable-metrics".to_owned(), YamlValue::True),
            ("cuda-graph-bs-decode".to_owned(), YamlValue::Words(vec!["1".into(), "2".into(), "4".into()])),
            ("json-model-override-args".to_owned(), word(r#"{"a":{"b":[1,"012","yes",true]}}"#)),
            ("chat-template".to_owned(), word("a\nb")),
            ("random-seed".to_owned(), word("-1")),
        ]
    );
    assert_eq!(
        resolved_flags.argv,
        [
            "--tool-server=--x",
            "--lora-paths",
            "a=/x",
            r#"{"lora_name":"b","lora_path":"/y"}"#,
            "--no-enable-tf32-matmul"
        ]
    );
    let refused = "cuda-graph-bs-decode: [1, --x]\nrandom-seed: [1, 2]\nchunked-prefill-size: many\n\
                   tool-call-parser: deepseek\nlora-paths: [a=org/adapter]\nenable-ep-moe: true\npp-size: true";
    insta::assert_snapshot!(resolved(&with_flags(refused)).unwrap_err());
}

#[test]
fn i05_flags_that_the_engine_renamed_are_translated_only_where_it_lacks_them() {
    let said = with_flags("cuda-graph-max-bs: 32\ncollect-tokens-histogram: true\nenable-flashinfer-mla: true");
    let config = said.config();
    let now = resolve(&config, FlagTable::bundled()).unwrap();
    assert_eq!(
        now.yaml,
        [("cuda-graph-max-bs-decode".to_owned(), word("32")), ("attention-backend".to_owned(), word("flashinfer"))]
    );
    assert_eq!(now.warnings.len(), 3);

    let older = serde_json::from_str(
        r#"{"version": "0.5.15", "flags": [
            {"name": "cuda-graph-max-bs", "action": "store", "element_type": "int", "yaml_supported": true},
            {"name": "collect-tokens-histogram", "action": "store_true", "nargs": 0, "yaml_supported": true},
            {"name": "enable-flashinfer-mla", "action": "store_true", "nargs": 0, "yaml_supported": true}]}"#,
    )
    .unwrap();
    let origin = sglangd::engine::flags::TableOrigin::Installed { path: "/x/server_args.py".into() };
    let then = resolve(&config, &FlagTable::new(older, origin)).unwrap();
    assert_eq!(
        then.yaml,
        [
            ("cuda-graph-max-bs".to_owned(), word("32")),
            ("collect-tokens-histogram".to_owned(), YamlValue::True),
            ("enable-flashinfer-mla".to_owned(), YamlValue::True)
        ]
    );
    assert_eq!(then.warnings, Vec::<String>::new());
}

#[test]
fn i06_the_engine_gets_one_config_in_two_words_that_ends_in_yaml() {
    let machine =
        with_flags("config: other.yaml\nhost: 1.2.3.4\ntensor-parallel-size: 1\nlog-level: error").flags(&["--port=9"]);
    let config = machine.config();
    let resolved = resolve(&config, FlagTable::bundled()).unwrap();
    assert_eq!(resolved.warnings.len(), 4, "config, host, log-level, port: {:#?}", resolved.warnings);
    assert_eq!(resolved.yaml, [("log-level".to_owned(), word("error"))]);
    let argv = plan_argv(&machine);
    let places: Vec<usize> = (0..argv.len()).filter(|&at| argv[at].starts_with("--config")).collect();
    assert_eq!(places.len(), 1, "{argv:?}");
    assert!(argv[places[0]] == "--config" && argv[places[0] + 1].ends_with("/engine.yaml"), "{argv:?}");
}

fn plan_argv(machine: &Machine) -> Vec<String> {
    let ended = machine.plan(&["--json"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    let plan: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    serde_json::from_value(plan["engine"]["argv"].clone()).unwrap()
}

#[test]
fn i07_anchors_aliases_and_deep_nesting_are_refused_before_they_grow() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..30 {
        let before = vec![format!("*a{}", n - 1); 10].join(", ");
        writeln!(bomb, "a{n}: &a{n} [{before}]").unwrap();
    }
    let aliases = format!("a: &a x\nb: [{}]\n", vec!["*a"; 10_000].join(", "));
    for text in [bomb.as_str(), &aliases, "a: &a\n  b: *a\n", "a:\n  <<: {b: c}\n"] {
        let refused = Machine::with(text).refused();
        assert!(refused.contains("anchors (`&x`), aliases (`*x`) and merge keys"), "{refused}");
    }
    for open in ["[", "{a: ", "- "] {
        let refused = Machine::with(&open.repeat(20_000)).refused();
        assert!(
            refused.contains("nested") || refused.contains("not valid YAML"),
            "{}",
            &refused[..refused.len().min(500)]
        );
    }
}

#[test]
fn i08_secrets_are_shown_nowhere_and_stand_in_no_command_line() {
    const SECRET: &str = "hunter22-do-not-show";
    let flags = format!("api-key: {SECRET}\nadmin-api-key: {SECRET}\nssl-keyfile-password: {SECRET}");
    let machine = with_flags(&flags)
        .env("HF_TOKEN", SECRET)
        .set(&format!("engine.env.HUGGING_FACE_HUB_TOKEN={SECRET}"))
        .set(&format!("engine.env.MY_PASSWORD={SECRET}"));
    for more in [vec![], vec!["--json"], vec!["--", "--api-key", SECRET]] {
        let ended = machine.plan(&more);
        assert_eq!(ended.code, 0, "{}", ended.err);
        assert!(!ended.out.contains(SECRET) && !ended.err.contains(SECRET), "{}", ended.out);
    }
    // Nor in the snippet of a mistake on the next line.
    let refused = resolved(&with_flags(&format!("{flags}\nno-such-flag-at-all: 1"))).unwrap_err();
    assert!(refused.contains("no-such-flag-at-all") && !refused.contains(SECRET), "{refused}");
}

#[test]
fn i09_of_two_sayings_the_documented_one_wins_and_plan_shows_both() {
    let machine =
        Machine::with(&format!("{MODEL}limits:\n  max: 1\n  target: 1\nengine:\n  flags:\n    random-seed: 1\n"))
            .file(
                "second.yaml",
                b"limits:\n  max: 2\n  target: 2\nengine:\n  flags:\n    random-seed: 2\n    chunked-prefill-size: 3\n",
            )
            .file("third.yaml", b"engine:\n  flags:\n    chunked-prefill-size: null\n")
            .env("SGLANGD_LIMITS_MAX", "3")
            .env("SGLANGD_ENGINE_FLAGS_RANDOM_SEED", "3")
            .env("SGLANGD_LIMITS_MAXX", "9")
            .set("limits.max=4")
            .set("limits.max=5")
            .set("engine.flags.random-seed=4")
            .flags(&["--random-seed", "5"]);
    let loaded = machine.load().unwrap();
    assert_eq!((loaded.config.limits.max, loaded.config.limits.target), (5, 2));
    let flags = &loaded.config.engine.flags.0;
    assert_eq!(flags.len(), 1, "{flags:?}");
    assert_eq!((flags[0].name.as_str(), &flags[0].value), ("random-seed", &FlagValue::Word("5".into())));
    assert_eq!(loaded.warnings.len(), 1);
    assert!(
        loaded.warnings[0].contains("SGLANGD_LIMITS_MAXX")
            && loaded.warnings[0].contains("did you mean SGLANGD_LIMITS_MAX?")
    );
    let kept = ["limits.max", "limits.target", "engine.flags.random-seed"];
    let shown: Vec<_> = loaded.origins.into_iter().filter(|origin| kept.contains(&origin.key.as_str())).collect();
    insta::assert_json_snapshot!(shown);
}

#[test]
fn i09_a_native_yaml_takes_the_place_of_the_flags_and_the_command_line_still_wins() {
    let machine = with_flags("random-seed: 1\nchunked-prefill-size: 2")
        .env("APP_LOCAL_CONFIG_PATH", "native.yaml")
        .flags(&["--random-seed", "7"]);
    std::fs::write(machine.path("native.yaml"), "random-seed: 3\nenable-metrics: true\nport: 1234\n").unwrap();
    let loaded = machine.load().unwrap();
    assert!(loaded.notices[0].contains("native.yaml (2 flags"), "{:?}", loaded.notices);
    let resolved = resolve(&loaded.config, FlagTable::bundled()).unwrap();
    assert_eq!(resolved.yaml, [("enable-metrics".to_owned(), YamlValue::True), ("random-seed".to_owned(), word("7"))]);
    assert_eq!(resolved.warnings.len(), 1, "{:?}", resolved.warnings);
    let missing = with_flags("random-seed: 1").env("APP_LOCAL_CONFIG_PATH", "nowhere.yaml").refused();
    assert!(missing.contains("nowhere.yaml does not exist") && missing.contains("APP_LOCAL_CONFIG_PATH"), "{missing}");
}

#[test]
fn i10_impossible_values_are_refused_before_anything_starts() {
    let impossible = "model:\n  repo: not a repo\n  name: 'a:b'\nengine:\n  tp: 0\n  command: python3 -m sglang\n\
                      listen:\n  public: 0.0.0.0:0\n  admin: 127.0.0.1:70000\n\
                      limits:\n  max: 0\n  target: 012\n  queue_timeout: 1:30\n  max_body: 64M\n\
                      health:\n  probe_timeout: 1s\nrestart:\n  backoff: 2min\n  backoff_max: 1min\n  on_give_up: maybe\n\
                      shutdown:\n  grace: 3s\nobserve:\n  log: xml\nstart:\n  stall:\n";
    let machine = Machine::with(impossible);
    insta::assert_snapshot!(machine.refused());
    assert_eq!(machine.plan(&[]).code, 65);

    let same = Machine::with(&format!("{MODEL}listen:\n  public: 0.0.0.0:8000\n  admin: 127.0.0.1:8000\n")).refused();
    assert!(same.contains("are the same port"), "{same}");
    let gpus =
        Machine::with(&format!("{MODEL}engine:\n  tp: 8\n  env:\n    CUDA_VISIBLE_DEVICES: 0,1,2,3\n")).refused();
    assert!(gpus.contains("`engine.tp` is 8 but CUDA_VISIBLE_DEVICES names 4 GPUs"), "{gpus}");
    let share = resolved(&with_flags("mem-fraction-static: 1.5")).unwrap_err();
    assert!(share.contains("`1.5`, which is not between 0 and 1") && share.contains("config.yaml:5:5"), "{share}");
    let both = Machine::with("model:\n  repo: a/b\n  path: /x\n").refused();
    assert!(both.contains("exclude each other"), "{both}");
}

#[test]
fn i11_a_bad_new_configuration_is_an_error_that_leaves_the_old_one_standing() {
    let machine = Machine::with(&format!("{MODEL}limits:\n  max: 7\n"));
    let before = machine.config();
    std::fs::write(machine.path("config.yaml"), "limits:\n  max: seven\n").unwrap();
    assert!(machine.refused().contains("`seven`"));
    assert_eq!(std::fs::read_to_string(machine.path("config.yaml")).unwrap(), "limits:\n  max: seven\n");
    std::fs::write(machine.path("config.yaml"), format!("{MODEL}limits:\n  max: 7\n")).unwrap();
    assert_eq!(machine.config(), before);
}

#[test]
fn i12_a_path_that_is_no_readable_file_is_named_plainly() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let mut machine = Machine::new();
    std::fs::create_dir(machine.path("folder")).unwrap();
    nix::unistd::mkfifo(&machine.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink(machine.path("loop-b"), machine.path("loop-a")).unwrap();
    symlink(machine.path("loop-a"), machine.path("loop-b")).unwrap();
    let mut all = String::new();
    for name in ["folder", "fifo", "loop-a", "missing.yaml"] {
        machine.sources.files = vec![PathBuf::from(name)];
        all.push_str(&machine.refused().replace(machine.sources.cwd.to_str().unwrap(), "CWD"));
        let ended = machine.plan(&[]);
        assert_eq!((ended.code, ended.out.as_str()), (65, ""), "{name}");
    }
    insta::assert_snapshot!(all);

    // Root reads everything, so the binary is asked as nobody.
    let machine = Machine::with(MODEL);
    std::fs::set_permissions(machine.path("config.yaml"), PermissionsExt::from_mode(0o000)).unwrap();
    std::fs::set_permissions(machine.folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let mut command;
    if nix::unistd::geteuid().is_root() {
        let copy = machine.folder.path().join("sglangd");
        std::fs::copy(BIN, &copy).unwrap();
        command = machine.command(&copy);
        std::os::unix::process::CommandExt::uid(&mut command, 65_534);
        std::os::unix::process::CommandExt::gid(&mut command, 65_534);
    } else {
        command = machine.command(Path::new(BIN));
    }
    let ended = ended(&mut command);
    assert_eq!(ended.code, 65);
    assert!(ended.err.contains("config.yaml may not be read by this user"), "{}", ended.err);
}

// ---------------------------------------------------------------------- where files are looked for

#[test]
fn files_are_looked_for_in_order_and_the_shipped_one_is_written_out_once() {
    let mut machine = Machine::new();
    machine.sources.missing = WhenMissing::WriteOut;
    let place = machine.folder.path().join("home/.config/sglangd/config.yaml");
    let first = machine.load().unwrap();
    assert_eq!(first.files, std::slice::from_ref(&place));
    assert!(first.notices[0].contains(place.to_str().unwrap()));
    assert_eq!(std::fs::read_to_string(&place).unwrap(), sglangd::config::SHIPPED);
    assert_eq!(std::fs::read_dir(place.parent().unwrap()).unwrap().count(), 1, "no half-written file is left");
    // The second start changes nothing, and says nothing.
    std::fs::write(&place, format!("{MODEL}limits:\n  max: 3\n")).unwrap();
    let second = machine.load().unwrap();
    assert_eq!((second.config.limits.max, second.notices.len()), (3, 0));
    // Nearer places win.
    std::fs::write(machine.path("config.yaml"), format!("{MODEL}limits:\n  max: 4\n")).unwrap();
    assert_eq!(machine.config().limits.max, 4);
    std::fs::write(machine.path("named.yaml"), format!("{MODEL}limits:\n  max: 5\n")).unwrap();
    machine.sources.files.push("named.yaml".into());
    assert_eq!(machine.config().limits.max, 5);
}

#[test]
fn an_unwritable_place_means_the_built_in_configuration_and_a_warning() {
    let mut machine = Machine::new().env("XDG_CONFIG_HOME", "/proc/nowhere");
    machine.sources.missing = WhenMissing::WriteOut;
    let loaded = machine.load().unwrap();
    assert_eq!(loaded.config, Config::shipped());
    assert!(loaded.files.is_empty());
    assert!(loaded.warnings[0].contains("/proc/nowhere/sglangd/config.yaml"), "{:?}", loaded.warnings);
}

#[test]
fn a_proxy_alone_needs_no_model_and_no_flags() {
    let mut machine =
        Machine::with("limits:\n  max: 3\n").env("APP_LOCAL_CONFIG_PATH", "nowhere.yaml").set("limits.queue=0");
    machine.sources.needs = Needs::ProxyOnly;
    let config = machine.config();
    assert_eq!((config.limits.max, config.limits.queue, config.engine.flags.0.len()), (3, 0, 0));
    machine.sources.needs = Needs::Engine;
    machine.sources.env.remove(std::ffi::OsStr::new("APP_LOCAL_CONFIG_PATH"));
    assert!(machine.refused().contains("no model is named"));
}

#[test]
fn a_missing_python_or_sglang_is_named_with_the_way_out() {
    let machine = Machine::with(MODEL);
    let nowhere = ended(
        machine.command(Path::new(BIN)).args(["--set", "engine.command=[no-such-python, -m, sglang.launch_server]"]),
    );
    assert_eq!(nowhere.code, 65);
    assert!(nowhere.err.contains("`no-such-python`: not found in PATH (/usr/bin:/bin)"), "{}", nowhere.err);
    assert!(nowhere.out.contains("would serve a/b"), "what is known is shown all the same: {}", nowhere.out);
    let folder = ended(machine.command(Path::new(BIN)).args(["--set", "engine.command=[/etc/passwd, -m, sglang]"]));
    assert_eq!(folder.code, 65);
    assert!(folder.err.contains("`/etc/passwd`: it may not be executed"), "{}", folder.err);
}

#[test]
fn plan_shows_the_whole_start() {
    let machine = with_flags(
        "enable-metrics: true\nspeculative-draft-model-path: org/draft\nspeculative-draft-model-revision: v2",
    )
    .set("engine.env.A=b c");
    let gpus = machine.folder.path().join("gpus");
    std::fs::create_dir(&gpus).unwrap();
    let gpu = r#"{"index": 0, "uuid": "GPU-1", "name": "NVIDIA H100", "memory_total": 80, "memory_used": 1}"#;
    std::fs::write(gpus.join("gpus.json"), format!(r#"{{"driver": "580.95.05", "gpus": [{gpu}]}}"#)).unwrap();
    let machine = machine.env("SGLANGD_SIM_GPUS", gpus);
    let ended = machine.plan(&["--json", "--listen", "127.0.0.1:0"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    let folder = machine.folder.path().to_str().unwrap();
    insta::assert_snapshot!(ended.out.replace(folder, "MACHINE").replace(BIN, "SGLANGD"));
}

#[test]
fn every_key_is_in_the_documentation_with_its_default() {
    let page = include_str!("../docs/configuration.md");
    for key in sglangd::config::keys::KEYS {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{}` |", key.path)));
        let row = row.unwrap_or_else(|| panic!("docs/configuration.md has no row for {}", key.path));
        let default = key.default.map_or("–".to_owned(), |default| format!("`{default}`"));
        assert!(row.contains(&format!("| {default} |")), "{} has the default {default}: {row}", key.path);
    }
}
