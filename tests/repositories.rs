//! What `serve` brings from the hub before it starts the engine: the whole path from a flag to a folder
//! in the engine's YAML. What goes wrong on the way is group H's (`weights_faults`).

use std::fs;
use std::path::{Path, PathBuf};

use sglangd::simulate::hub::{COMMIT, Fault, Route, What, Which};

use crate::harness::daemon::{SGLANGD, Setup};
use crate::harness::hub::{REPO, Site};
use crate::harness::scene::{SOON, is_whole, quick_engine, streamed, text_at};

const SHARDS: [&str; 3] =
    ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"];

/// A daemon that knows its model as a repository of this hub.
fn serving(site: &Site, flags: &str) -> Setup {
    quick_engine(Setup::bare(), "").config(&format!(
        "model:\n  repo: {REPO}\n  name: small\nweights:\n  cache: {}\n  endpoint: {}\n\
         engine:\n  command: [{SGLANGD}, simulate]\n  tp: 1\n  flags: {{{flags}}}\n",
        site.cache().display(),
        site.hub.endpoint(),
    ))
}

fn snapshot(site: &Site, repo: &str) -> PathBuf {
    site.cache().join(format!("models--{}", repo.replace('/', "--"))).join("snapshots").join(COMMIT)
}

/// What the engine was told, word by word: its YAML in the runtime folder.
fn engine_yaml(runtime: &Path) -> String {
    fs::read_to_string(runtime.join("engine.yaml")).unwrap()
}

#[tokio::test]
async fn with_dummy_weights_the_engine_starts_on_all_but_the_weight_files() {
    let site = Site::new().await;
    let mut daemon = serving(&site, "load-format: dummy").start();
    let status = daemon.is_ready(SOON).await;
    let model = snapshot(&site, REPO);
    assert_eq!(text_at(&status, "/model/path"), model.display().to_string());
    for needed in ["config.json", "tokenizer.json"] {
        assert!(model.join(needed).is_file(), "the engine needs {needed}");
    }
    for shard in SHARDS {
        assert!(!model.join(shard).exists(), "{shard} was fetched for nothing");
        assert!(!site.hub.seen().iter().any(|seen| format!("{seen:?}").contains(shard)), "{shard} was asked for");
    }
    assert!(is_whole(&streamed(daemon.public(), 5)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_draft_model_and_a_tokenizer_come_with_the_model_and_the_engine_gets_their_folders() {
    let site = Site::new().await;
    let flags = "speculative-draft-model-path: made-up/draft, tokenizer-path: made-up/words";
    let mut daemon = serving(&site, flags).start();
    daemon.is_ready(SOON).await;
    let (draft, words) = (snapshot(&site, "made-up/draft"), snapshot(&site, "made-up/words"));
    let yaml = engine_yaml(&daemon.runtime_dir());
    for (flag, folder) in [("speculative-draft-model-path", &draft), ("tokenizer-path", &words)] {
        let said = yaml
            .lines()
            .find(|line| line.starts_with(&format!("\"{flag}\"")))
            .unwrap_or_else(|| panic!("no {flag}: {yaml}"));
        assert!(said.contains(&*folder.to_string_lossy()), "{said}");
    }
    assert!(draft.join(SHARDS[0]).is_file(), "a draft model has weights");
    assert!(words.join("tokenizer.json").is_file() && !words.join(SHARDS[0]).exists(), "a tokenizer has none");
    assert!(is_whole(&streamed(daemon.public(), 5)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_draft_model_that_the_hub_does_not_have_is_named_before_the_engine_starts() {
    let site = Site::new().await;
    let missing = What::Refuse { status: 404, retry_after: None, code: Some("RepoNotFound") };
    let which = Which::All;
    site.hub.fault(Fault { on: Route::Api, which, about: Some("made-up/draft".to_owned()), what: missing });
    let mut daemon = serving(&site, "speculative-draft-model-path: made-up/draft").start();
    let status = daemon.reaches(&["gave_up"], SOON).await;
    let said = status.to_string();
    assert!(said.contains("made-up/draft"), "{said}");
    assert!(!daemon.runtime_dir().join("engine.yaml").exists(), "no engine was to be started");
    daemon.stops_clean(SOON).await;
}
