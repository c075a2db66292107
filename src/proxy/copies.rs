//! What the engine says of itself (`/server_info`, `/model_info`, `/v1/loads`), passed on as copies without
//! secrets: what a router in front needs.
//!
//! The real `/server_info` names the engine's keys and asks its scheduler, so it hangs with it. A copy is
//! asked for once, however many clients want it, and an old one of the same engine is better than none
//! while the engine is slow to answer. Whether clients may have them is [`super::routes`]'.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Response, Uri};
use serde_json::Value;
use tokio::time::{Instant, timeout};

use super::answer::Answer;
use super::error::Refusal;
use super::state::{Mode, Shared};
use super::upstream::ask;
use crate::link::{Gate, Upstream};

/// Largest answer taken: `/server_info` of eight ranks is some 300 KiB.
const MOST: usize = 4 << 20;
/// How long the engine may take. A scheduler in a long prefill answers behind it.
const PATIENCE: Duration = Duration::from_secs(3);
/// What does not change while an engine lives, but for a few figures that nobody routes by.
const SLOW: Duration = Duration::from_secs(30);
/// Routers ask for loads each few seconds, each of their threads.
const QUICK: Duration = Duration::from_millis(500);
/// Combinations of `/v1/loads`' parameters that are kept.
const KEPT: usize = 32;

/// The copies of one engine.
#[derive(Debug, Default)]
pub struct Copies {
    engine: Mutex<Option<Upstream>>,
    by_target: Mutex<HashMap<String, Arc<Copy>>>,
}

/// One page.
#[derive(Debug, Default)]
struct Copy {
    /// Held by who asks the engine; the others wait for what comes of it.
    asking: tokio::sync::Mutex<()>,
    last: Mutex<Last>,
}

#[derive(Debug, Default, Clone)]
struct Last {
    /// The last attempt to get it, whatever came of it.
    tried: Option<Instant>,
    page: Option<(Instant, Page)>,
}

/// A page as clients get it.
#[derive(Debug, Clone)]
struct Page {
    kind: HeaderValue,
    body: Bytes,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Copies {
    /// The page for `target`, forgetting those of another engine.
    fn of(&self, engine: &Upstream, target: &str) -> Arc<Copy> {
        let mut known = locked(&self.engine);
        let mut copies = locked(&self.by_target);
        if known.as_ref() != Some(engine) || (copies.len() >= KEPT && !copies.contains_key(target)) {
            copies.clear();
            *known = Some(engine.clone());
        }
        Arc::clone(copies.entry(target.to_owned()).or_default())
    }
}

/// Answers with a copy of the engine's page.
pub async fn answer(shared: &Shared, uri: &Uri) -> Result<Response<Answer>, Refusal> {
    let snapshot = shared.snapshot();
    let view = snapshot.engine.as_ref().filter(|view| view.state.gate() == Gate::Open);
    let Some((view, engine)) = view.and_then(|view| Some((view, view.upstream.as_ref()?))) else {
        return Err(match snapshot.mode {
            Mode::Serving => Refusal::engine(snapshot.engine.as_ref()),
            Mode::Draining | Mode::Cut(_) | Mode::Closed => Refusal::draining(),
        });
    };
    let (target, age) = target(uri).ok_or_else(Refusal::unknown_query)?;
    let copy = shared.copies.of(engine, &target);
    let page = if view.suspected { copy.kept() } else { copy.fresh(engine, &target, age).await };
    page.map(Page::into_response).ok_or_else(Refusal::no_copy)
}

impl Copy {
    fn kept(&self) -> Option<Page> {
        locked(&self.last).page.as_ref().map(|(_, page)| page.clone())
    }

    /// The page if it is younger than `age`.
    fn young(&self, age: Duration) -> Option<Page> {
        locked(&self.last).page.as_ref().filter(|(at, _)| at.elapsed() < age).map(|(_, page)| page.clone())
    }

    /// Asks the engine where the page is old, and takes the old one where that fails.
    async fn fresh(&self, engine: &Upstream, target: &str, age: Duration) -> Option<Page> {
        if let Some(page) = self.young(age) {
            return Some(page);
        }
        let since = Instant::now();
        let _asking = self.asking.lock().await;
        if locked(&self.last).tried.is_some_and(|tried| tried >= since) {
            return self.kept();
        }
        let found = match timeout(PATIENCE, ask::get(engine, target, MOST)).await {
            Ok(Ok(answer)) if answer.status == StatusCode::OK => page(engine, answer),
            Ok(Ok(answer)) => {
                tracing::debug!(status = %answer.status, "the engine has no {target}");
                None
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "the engine did not answer {target}");
                None
            }
            Err(_) => {
                tracing::debug!("the engine did not answer {target} within {} s", PATIENCE.as_secs());
                None
            }
        };
        let mut last = locked(&self.last);
        let now = Instant::now();
        last.tried = Some(now);
        if let Some(page) = found {
            last.page = Some((now, page));
        }
        last.page.as_ref().map(|(_, page)| page.clone())
    }
}

impl Page {
    fn into_response(self) -> Response<Answer> {
        let mut response = Response::new(Answer::Own(Some(self.body)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, self.kind);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}

/// What is asked of the engine for a client's `uri`, and how old the answer may be; none: parameters
/// that are not known. Names that the engine has deprecated are asked for by their new ones.
fn target(uri: &Uri) -> Option<(String, Duration)> {
    let path = uri.path();
    let canonical = match path {
        "/get_server_info" => "/server_info",
        "/get_model_info" => "/model_info",
        _ => path,
    };
    match (canonical, uri.query().filter(|query| !query.is_empty())) {
        ("/v1/loads", Some(query)) => Some((format!("{canonical}?{}", loads_query(query)?), QUICK)),
        ("/v1/loads", None) => Some((canonical.to_owned(), QUICK)),
        // They take none.
        _ => Some((canonical.to_owned(), SLOW)),
    }
}

const SECTIONS: [&str; 7] = ["all", "core", "disagg", "lora", "memory", "queues", "spec"];

/// `include=core,memory&dp_rank=0&format=json`, each at most once, in an order of our own: so that few
/// pages are kept, and nothing passes that the engine could read in another way.
fn loads_query(query: &str) -> Option<String> {
    let (mut include, mut rank, mut format) = (None, None, None);
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=')?;
        let slot = match name {
            "include" => {
                let mut sections: Vec<&str> = value.split(',').collect();
                sections.sort_unstable();
                sections.dedup();
                include.replace(sections.iter().all(|name| SECTIONS.contains(name)).then(|| sections.join(","))?)
            }
            "dp_rank" => rank.replace(value.parse::<u16>().ok()?.to_string()),
            "format" => format.replace(["json", "prometheus"].contains(&value).then(|| value.to_owned())?),
            _ => return None,
        };
        if slot.is_some() {
            return None;
        }
    }
    let parts = [("include", include), ("dp_rank", rank), ("format", format)];
    let said = parts.into_iter().filter_map(|(name, value)| value.map(|value| format!("{name}={value}")));
    Some(said.collect::<Vec<_>>().join("&"))
}

/// The engine's answer without what is secret; none: it cannot be read, so nobody could tell.
fn page(engine: &Upstream, answer: ask::Answer) -> Option<Page> {
    let kind = answer.headers.get(CONTENT_TYPE).cloned().unwrap_or(HeaderValue::from_static("application/json"));
    if kind.as_bytes().starts_with(b"text/plain") {
        // Prometheus' format: numbers, and labels that hold no secret.
        let text = String::from_utf8(answer.body).ok()?;
        let safe = engine.api_key.as_ref().is_none_or(|key| !text.contains(key.as_str()));
        return safe.then(|| Page { kind, body: text.into() });
    }
    let mut value: Value = serde_json::from_slice(&answer.body).ok()?;
    redact(&mut value, engine.api_key.as_deref());
    Some(Page { kind: HeaderValue::from_static("application/json"), body: value.to_string().into() })
}

/// As the engine itself says it of its watermark's keys.
const MASK: &str = "<redacted>";

/// Takes texts out whose name says that they are secret, the engine's command line (keys may stand on it),
/// and the engine's key wherever it stands. Numbers and shapes stay.
fn redact(value: &mut Value, key: Option<&str>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                if is_secret(name) && (member.is_string() || member.is_array()) {
                    *member = MASK.into();
                } else {
                    redact(member, key);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| redact(item, key)),
        Value::String(text) if key.is_some_and(|key| text.contains(key)) => *value = MASK.into(),
        _ => {}
    }
}

fn is_secret(name: &str) -> bool {
    const WORDS: [&str; 8] = ["key", "keys", "password", "passphrase", "secret", "token", "credential", "credentials"];
    name == "launch_command" || name.to_ascii_lowercase().split(['_', '-', '.']).any(|word| WORDS.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn secrets_go_and_shapes_stay() {
        let mut info = json!({
            "api_key": "sk-1", "admin_api_key": null, "ssl_keyfile_password": "p", "watermark_key_b": "w",
            "model_path": "/models/m", "max_total_num_tokens": 65536, "tokenizer_path": "/models/m",
            "launch_command": ["python", "--api-key", "sk-1"], "note": "started with engine-key here",
            "internal_states": [{"api_key": "sk-1", "token_usage": 0.5, "hf_token": "hf_x"}],
        });
        redact(&mut info, Some("engine-key"));
        assert_eq!(
            info,
            json!({
                "api_key": MASK, "admin_api_key": null, "ssl_keyfile_password": MASK, "watermark_key_b": MASK,
                "model_path": "/models/m", "max_total_num_tokens": 65536, "tokenizer_path": "/models/m",
                "launch_command": MASK, "note": MASK,
                "internal_states": [{"api_key": MASK, "token_usage": 0.5, "hf_token": MASK}],
            })
        );
    }

    #[test]
    fn parameters_of_loads_pass_in_one_order_or_not_at_all() {
        let asked = |uri: &str| target(&uri.parse().expect("a URI")).map(|(target, _)| target);
        assert_eq!(asked("/v1/loads").as_deref(), Some("/v1/loads"));
        assert_eq!(
            asked("/v1/loads?format=json&include=memory,core,core&dp_rank=03").as_deref(),
            Some("/v1/loads?include=core,memory&dp_rank=3&format=json")
        );
        for odd in
            ["x=1", "include=core&include=all", "include=", "dp_rank=-1", "format=html", "include", "include=core%26"]
        {
            assert_eq!(asked(&format!("/v1/loads?{odd}")), None, "{odd}");
        }
        assert_eq!(asked("/get_server_info?x=y").as_deref(), Some("/server_info"));
        assert_eq!(asked("/get_model_info").as_deref(), Some("/model_info"));
    }
}
