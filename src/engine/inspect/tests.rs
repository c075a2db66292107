use super::*;
use crate::config::Config;

fn program(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn engine(command: &[&str]) -> Engine {
    Engine { command: command.iter().map(|&word| word.to_owned()).collect(), ..Config::shipped().engine }
}

#[test]
fn the_python_behind_a_command_is_found_however_it_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let python = program(folder.path(), "python3.11", "");
    let named = format!("#!{python}\nimport sglang\n");
    let long = format!("#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n");
    let found = |command: &[&str]| interpreter(&engine(command)).unwrap();
    let wanted = Some(PathBuf::from(&python));
    assert_eq!(found(&[&python, "-m", "sglang.launch_server"]), wanted);
    assert_eq!(found(&["numactl", "--interleave=all", &python, "-u", "-m", "sglang.launch_server"]), wanted);
    for text in [named, long] {
        let script = program(folder.path(), "sglang", &text);
        assert_eq!(found(&[&script, "serve"]), wanted, "{text}");
    }
    let mut by_env = engine(&["sglang", "serve"]);
    by_env.env.insert("PATH".into(), folder.path().to_str().unwrap().into());
    program(folder.path(), "sglang", "#!/usr/bin/env python3.11\n");
    assert_eq!(interpreter(&by_env).unwrap(), wanted);
    assert_eq!(found(&["/usr/bin/sglangd", "simulate"]), None);
    let shell = program(folder.path(), "sglang", "#!/bin/bash\n");
    assert_eq!(found(&[&shell]), None);
}

/// A stand-in for Python that knows the script's two questions.
#[test]
fn an_answer_is_kept_until_the_engines_server_args_change() {
    let folder = tempfile::tempdir().unwrap();
    let server_args = program(folder.path(), "server_args.py", "one");
    let table =
        r#"{"version": "9.9", "flags": [{"name": "x", "action": "store_true", "nargs": 0, "yaml_supported": true}]}"#;
    let text = format!(
        "#!/bin/sh\ncase $3 in locate) echo {server_args};; dump) echo noise; echo '{table}' > \"$4\";; esac\n"
    );
    let python = program(folder.path(), "python3", &text);
    let engine = engine(&[&python, "-m", "sglang.launch_server"]);
    let cache = folder.path().join("state/deeper");
    let asked = || installed_table(&engine, &cache, Duration::from_secs(30)).unwrap();
    let first = asked();
    assert_eq!((first.how, first.warning.as_deref(), first.table.version.as_str()), (How::Asked, None, "9.9"));
    assert_eq!(asked().how, How::Cached);
    assert!(cached_table(&engine, &cache).is_some_and(|table| table.has("x")));
    std::fs::write(&server_args, "two and longer").unwrap();
    assert!(cached_table(&engine, &cache).is_none());
    assert_eq!(asked().how, How::Asked);

    // A parser that breaks is a warning, and the shipped table stands in.
    std::fs::write(&server_args, "three").unwrap();
    let broken =
        "#!/bin/sh\ncase $3 in locate) echo SERVER_ARGS;; dump) echo 'ImportError: no torch' >&2; exit 1;; esac\n";
    program(folder.path(), "python3", &broken.replace("SERVER_ARGS", &server_args));
    let fallback = asked();
    assert_eq!(fallback.how, How::Bundled);
    assert!(fallback.warning.unwrap().contains("ImportError: no torch"));

    // Without SGLang there is nothing to start.
    program(folder.path(), "python3", "#!/bin/sh\necho 'sglang is not installed' >&2\nexit 1\n");
    let error = installed_table(&engine, &cache, Duration::from_secs(30)).unwrap_err();
    assert!(matches!(&error, InspectError::NoSglang { said, .. } if said == "sglang is not installed"), "{error}");
}
