//! One question: find the server, ask until it answers, read the stream to its end.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::sse::Events;
use super::{Page, Part, ProbeArgs};
use crate::cli::status::{ask as ask_status, runtime_dir, socket};
use crate::health::client::Target;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);
const SYSTEM: &str = "You are a helpful AI assistant.";
/// Between two tries, when the server does not say.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause that a server's `Retry-After` is taken for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A stream that says nothing for so long has ended without saying so.
const STALL: Duration = Duration::from_mins(5);

/// Whether a server that is not there, or not yet, is asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retries {
    None,
    Until(Duration),
}

#[derive(Debug)]
pub struct Server {
    client: reqwest::Client,
    place: Place,
    key: Option<String>,
    model: Option<String>,
    max_tokens: Option<u32>,
}

/// Where the server is, or who knows.
#[derive(Debug)]
enum Place {
    Url(String),
    Daemon(Target),
}

/// Whom to ask, and how.
struct Found {
    client: reqwest::Client,
    base: String,
    /// The model's, where the daemon says it.
    name: Option<String>,
}

/// For a daemon of this machine. Its certificate is not made out to the loopback, and nobody stands in
/// between; a proxy of the environment has nothing to do with it.
fn on_this_machine() -> reqwest::ClientBuilder {
    reqwest::Client::builder().connect_timeout(CONNECT).no_proxy().tls_danger_accept_invalid_certs(true)
}

/// The line of figures under an answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    first: Duration,
    whole: Duration,
    tokens: u64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let streaming = self.whole.saturating_sub(self.first).as_secs_f64();
        let rate = if streaming > 0.0 { self.tokens.saturating_sub(1) as f64 / streaming } else { 0.0 };
        let (first, whole, tokens) = (self.first.as_secs_f64(), self.whole.as_secs_f64(), self.tokens);
        write!(f, "first token after {first:.2} s, {tokens} tokens in {whole:.2} s, {rate:.1} tokens/s")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("{0}")]
    NotThere(String),
    #[error("the server refuses for now: {text}")]
    Later { text: String, after: Option<Duration> },
    #[error("the server refused the question: {0}")]
    Refused(String),
    #[error("no answer began within {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("the answer ended with an error: {0}")]
    Event(String),
    #[error("the answer broke off: {0}")]
    Broken(String),
}

impl AskError {
    /// Whether asking again can help, and when.
    fn again(&self) -> Option<Duration> {
        match self {
            Self::NotThere(_) | Self::TimedOut(_) => Some(PAUSE),
            Self::Later { after, .. } => Some(after.unwrap_or(PAUSE).clamp(Duration::from_millis(100), LONGEST_PAUSE)),
            // Part of an answer was shown already, or the question is at fault.
            Self::Refused(_) | Self::Event(_) | Self::Broken(_) => None,
        }
    }
}

impl Server {
    pub fn new(args: &ProbeArgs) -> Result<Self, String> {
        // On this machine a proxy of the environment has nothing to do with it.
        let mut client = reqwest::Client::builder().connect_timeout(CONNECT);
        let place = if let Some(url) = &args.url {
            let url = if url.contains("://") { url.clone() } else { format!("http://{url}") };
            let parsed = reqwest::Url::parse(&url).map_err(|error| format!("--url {url}: {error}"))?;
            if matches!(parsed.host_str(), Some("localhost" | "127.0.0.1" | "[::1]")) {
                client = client.no_proxy();
            }
            let url = url.trim_end_matches('/');
            Place::Url(url.strip_suffix("/v1").unwrap_or(url).to_owned())
        } else {
            client = on_this_machine();
            Place::Daemon(Target::Unix(socket(&runtime_dir(&args.folders))))
        };
        let key = args.key.clone().or_else(|| std::env::var("SGLANGD_API_KEY").ok()).filter(|key| !key.is_empty());
        Ok(Self {
            client: client.build().map_err(|error| format!("cannot make an HTTP client: {error}"))?,
            place,
            key,
            model: args.model.clone(),
            max_tokens: args.max_tokens,
        })
    }

    /// Asks until an answer begins, and prints it. `patience` is for its beginning.
    pub async fn ask(
        &self,
        question: &str,
        retries: Retries,
        patience: Duration,
        page: &mut Page,
    ) -> Result<Figures, AskError> {
        let deadline = Instant::now() + patience;
        let mut told = String::new();
        loop {
            let asked = Instant::now();
            let error = match tokio::time::timeout_at(deadline, self.begin(question)).await {
                Ok(Ok(response)) => return read(response, asked, page).await,
                Ok(Err(error)) => error,
                Err(_) => return Err(AskError::TimedOut(patience)),
            };
            let Some(pause) = error.again().filter(|_| retries != Retries::None) else { return Err(error) };
            if Instant::now() + pause >= deadline {
                return Err(error);
            }
            let text = error.to_string();
            if text != told {
                eprintln!("sglangd: {text}; trying again");
                told = text;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Sends the question; an answer has begun when its head is there and says 200.
    async fn begin(&self, question: &str) -> Result<Response, AskError> {
        let Found { client, base, name } = self.find().await?;
        let model = match self.model.clone().or(name) {
            Some(model) => model,
            None => self.first_model(&client, &base).await?,
        };
        let mut body = json!({
            "model": model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let (Some(max), Some(body)) = (self.max_tokens, body.as_object_mut()) {
            body.insert("max_tokens".into(), max.into());
        }
        let request = self.with_key(client.post(format!("{base}/v1/chat/completions"))).json(&body);
        checked(request.send().await.map_err(|error| sending(&error))?).await
    }

    fn with_key(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    async fn find(&self) -> Result<Found, AskError> {
        let client = self.client.clone();
        let target = match &self.place {
            Place::Url(url) => return Ok(Found { client, base: url.clone(), name: None }),
            Place::Daemon(target) => target,
        };
        let text = ask_status(target).await.map_err(AskError::NotThere)?;
        // Only these two are needed: a newer or older sglangd's status must not stop a question.
        let status: Value = serde_json::from_str(&text)
            .map_err(|error| AskError::NotThere(format!("no status was answered: {error}")))?;
        let said = |at: &str| status.pointer(at).and_then(Value::as_str).filter(|text| !text.is_empty());
        let name = said("/model/name").map(str::to_owned);
        if let Some(path) = said("/listen/unix") {
            let client = on_this_machine().unix_socket(path).build().map_err(|error| sending(&error))?;
            return Ok(Found { client, base: "http://localhost".to_owned(), name });
        }
        let public: SocketAddr = said("/listen/public")
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| AskError::NotThere("the daemon names no public address".into()))?;
        let scheme = match status.pointer("/listen/tls").and_then(Value::as_bool) {
            Some(true) => "https",
            _ => "http",
        };
        Ok(Found { client, base: format!("{scheme}://{}", reachable(public)), name })
    }

    async fn first_model(&self, client: &reqwest::Client, base: &str) -> Result<String, AskError> {
        let request = self.with_key(client.get(format!("{base}/v1/models")));
        let response = checked(request.send().await.map_err(|error| sending(&error))?).await?;
        let list: Value = response.json().await.map_err(|error| AskError::Broken(error.to_string()))?;
        match list.pointer("/data/0/id").and_then(Value::as_str) {
            Some(name) => Ok(name.to_owned()),
            None => Err(AskError::Refused("it names no model; say one with --model".into())),
        }
    }
}

/// A wildcard address is listened on, not connected to.
fn reachable(mut addr: SocketAddr) -> SocketAddr {
    if addr.ip().is_unspecified() {
        addr.set_ip(if addr.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    addr
}

/// Nothing was answered: everything before a response's head may be tried again.
fn sending(error: &reqwest::Error) -> AskError {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    AskError::NotThere(text)
}

async fn checked(response: Response) -> Result<Response, AskError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let after = response
        .headers()
        .get(reqwest::header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .map(Duration::from_secs);
    let body = tokio::time::timeout(Duration::from_secs(10), response.text()).await;
    let body = body.ok().and_then(Result::ok).unwrap_or_default();
    let text = format!("{status}: {}", message(&body));
    match status {
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Err(AskError::Later { text, after }),
        StatusCode::GATEWAY_TIMEOUT | StatusCode::REQUEST_TIMEOUT | StatusCode::BAD_GATEWAY => {
            Err(AskError::Later { text, after })
        }
        _ => Err(AskError::Refused(text)),
    }
}

/// The words of an error: OpenAI's nested shape, SGLang's flat one, or the text itself.
fn message(body: &str) -> String {
    let value: Value = serde_json::from_str(body).unwrap_or_default();
    let found = ["/error/message", "/message", "/error", "/detail"].iter().find_map(|at| value.pointer(at)?.as_str());
    let text = found.unwrap_or(body).trim();
    if text.is_empty() { "no reason given".into() } else { text.chars().take(300).collect() }
}

async fn read(mut response: Response, asked: Instant, page: &mut Page) -> Result<Figures, AskError> {
    let mut events = Events::default();
    let mut answer = Reading { first: None, pieces: 0, usage: None, done: false, error: None };
    loop {
        let chunk = match tokio::time::timeout(STALL, response.chunk()).await {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) => break,
            // What came before a broken end still counts: an error event may be among it.
            Ok(Err(error)) => {
                return Err(answer.error.map_or_else(|| AskError::Broken(error.to_string()), AskError::Event));
            }
            Err(_) => return Err(AskError::Broken(format!("no word for {} s", STALL.as_secs()))),
        };
        let pushed = events.push(&chunk, |data| answer.take(data, asked, page));
        pushed.map_err(|error| AskError::Broken(error.to_string()))?;
        if let Some(error) = answer.error.take() {
            return Err(AskError::Event(error));
        }
        if answer.done {
            break;
        }
    }
    if !answer.done {
        return Err(AskError::Broken("the stream ended without [DONE]".into()));
    }
    let whole = asked.elapsed();
    Ok(Figures { first: answer.first.unwrap_or(whole), whole, tokens: answer.usage.unwrap_or(answer.pieces) })
}

struct Reading {
    first: Option<Duration>,
    pieces: u64,
    usage: Option<u64>,
    done: bool,
    error: Option<String>,
}

impl Reading {
    fn take(&mut self, data: &[u8], asked: Instant, page: &mut Page) {
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        let Ok(event) = serde_json::from_slice::<Value>(data) else {
            self.error = Some(format!("an event is no JSON: {}", String::from_utf8_lossy(data)));
            return;
        };
        if event.get("error").is_some_and(|error| !error.is_null()) || event.get("object") == Some(&json!("error")) {
            self.error = Some(message(&event.to_string()));
            return;
        }
        if let Some(tokens) = event.pointer("/usage/completion_tokens").and_then(Value::as_u64) {
            self.usage = Some(tokens);
        }
        for (at, part) in
            [("/choices/0/delta/reasoning_content", Part::Reasoning), ("/choices/0/delta/content", Part::Content)]
        {
            if let Some(text) = event.pointer(at).and_then(Value::as_str).filter(|text| !text.is_empty()) {
                self.first.get_or_insert_with(|| asked.elapsed());
                self.pieces += 1;
                page.write(part, text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_an_error_are_found_in_each_shape() {
        assert_eq!(message(r#"{"error":{"message":"loading, 12 %"}}"#), "loading, 12 %");
        assert_eq!(message(r#"{"object":"error","message":"too long"}"#), "too long");
        assert_eq!(message(r#"{"error":"Unauthorized"}"#), "Unauthorized");
        assert_eq!(message("<html>"), "<html>");
        assert_eq!(message(""), "no reason given");
    }

    #[test]
    fn a_wildcard_listener_is_reached_over_loopback() {
        let v4: SocketAddr = "0.0.0.0:8000".parse().expect("an address");
        let v6: SocketAddr = "[::]:8000".parse().expect("an address");
        assert_eq!(reachable(v4).to_string(), "127.0.0.1:8000");
        assert_eq!(reachable(v6).to_string(), "[::1]:8000");
    }

    #[test]
    fn the_figures_are_one_line() {
        let figures = Figures { first: Duration::from_millis(500), whole: Duration::from_millis(2500), tokens: 41 };
        assert_eq!(figures.to_string(), "first token after 0.50 s, 41 tokens in 2.50 s, 20.0 tokens/s");
    }
}
