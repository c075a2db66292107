//! Who may know whom: imports point downwards only (docs/design.md). A folder that needs another one
//! not named here needs a reason first.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each folder of `src/` and what it may import of the others.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("sys", &[]),
    ("link", &[]),
    ("admission", &["link"]),
    ("keys", &["admission"]),
    ("shutdown", &[]),
    ("health", &[]),
    ("node", &["sys"]),
    ("config", &["link"]),
    ("engine", &["config"]),
    ("weights", &["config", "sys"]),
    ("launch", &["sys", "engine"]),
    ("proxy", &["link", "admission", "keys", "sys"]),
    ("simulate", &["config", "engine", "observe", "weights"]),
    (
        "supervisor",
        &["config", "engine", "exit", "health", "launch", "link", "node", "observe", "shutdown", "sys", "weights"],
    ),
    ("observe", &["config", "health", "keys", "link", "node", "supervisor"]),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// What a file names as `crate::NAME`, outside of comments.
fn imports(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let names = code.flat_map(|line| line.split("crate::").skip(1).map(str::to_owned).collect::<Vec<_>>());
    names
        .map(|rest| rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect::<String>())
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn imports_point_downwards_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for (folder, allowed) in MAY_KNOW {
        let mut files = Vec::new();
        sources(&src.join(folder), &mut files);
        assert!(!files.is_empty(), "src/{folder} is gone: this test guards nothing there");
        for file in files {
            for name in imports(&fs::read_to_string(&file).unwrap()) {
                if name != *folder && !allowed.contains(&name.as_str()) {
                    wrong.push(format!("{} knows {name}", file.strip_prefix(&src).unwrap().display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_step_function_knows_nothing_but_its_own_types() {
    let source = |name: &str| {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/supervisor").join(name)).unwrap()
    };
    for (name, may_use) in [
        ("step.rs", "use super::restart::{Ledger, Next};"),
        ("step/words.rs", "use crate::supervisor::restart::{Failure, Millis, Terms};"),
        ("restart.rs", "use std::collections::VecDeque;"),
    ] {
        let text = source(name);
        let uses: Vec<&str> = text.lines().filter(|line| line.starts_with("use ")).collect();
        assert_eq!(uses, [may_use]);
        assert!(!text.contains("async") && !text.contains("Instant"), "{name}: no async, no clock");
    }
}

#[test]
fn every_folder_of_the_source_has_its_rule() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let folders: BTreeSet<String> = fs::read_dir(src)
        .unwrap()
        .map(Result::unwrap)
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    let ruled: BTreeSet<String> = MAY_KNOW.iter().map(|(folder, _)| (*folder).to_owned()).collect();
    // `cli` stands above all and may know all.
    assert_eq!(folders.difference(&ruled).collect::<Vec<_>>(), ["cli"]);
}

#[test]
fn j06_no_decision_is_made_by_the_wall_clock() {
    // Who may know the time of day, and only to show it, or to hold it against a certificate's dates.
    const MAY: [&str; 12] = [
        "observe/clock.rs",
        "simulate/",
        "cli/certificate.rs",
        "proxy/date.rs",
        "proxy/mod.rs",
        "proxy/transport/",
        "proxy/metrics",
        "observe/bundle.rs",
        "cli/fetch/",
        // What the engine stamps with its own clock of the day is held against ours.
        "supervisor/driver/vigil.rs",
        // A `Retry-After` may be a date, and the end of a right to read the store is one.
        "weights/hub.rs",
        "weights/xet.rs",
    ];
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut files, mut wrong) = (Vec::new(), Vec::new());
    sources(&src, &mut files);
    for file in files {
        let name = file.strip_prefix(&src).unwrap().display().to_string();
        let text = fs::read_to_string(&file).unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let tells = ["SystemTime", "Timestamp::now", "clock::unix", "CLOCK_REALTIME"];
        let found = code.filter(|line| tells.iter().any(|tell| line.contains(tell))).count();
        if found > 0 && !MAY.iter().any(|may| name.starts_with(may)) {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
