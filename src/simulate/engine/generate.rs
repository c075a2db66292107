//! The three ways to ask the simulated engine for text: what a request may say, what it is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::http::{Answer, events, json as answer_json};
use super::requests::{Engine, Request as Admitted};
use super::speech;

/// The model's context length, unless `--context-length` says another.
pub const CONTEXT: u64 = 32_768;

/// Events that wait for a slow reader before the stream's task waits too.
const EVENTS: usize = 64;

/// Which of the three answers a generation has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Chat,
    Text,
    Native,
}

/// What a request may ask; all else is accepted and has no effect.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Asked {
    model: Option<String>,
    messages: Option<Vec<Message>>,
    prompt: Option<Value>,
    text: Option<String>,
    rid: Option<String>,
    stream: bool,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    ignore_eos: bool,
    stream_options: Option<StreamOptions>,
    sampling_params: Option<Sampling>,
    chat_template_kwargs: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    content: Value,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Sampling {
    max_new_tokens: Option<u64>,
    ignore_eos: bool,
}

/// One answer, decided before its first token.
#[derive(Debug, Clone)]
struct Plan {
    reasoning: Vec<&'static str>,
    content: Vec<&'static str>,
    total: u64,
    finish: &'static str,
    prompt: u64,
    model: String,
    id: String,
    created: i64,
    usage: bool,
}

impl Plan {
    /// The `n`th token: of the reasoning, or of the content (over and over, when more was asked for).
    fn piece(&self, n: u64) -> (&'static str, bool) {
        let n = n as usize;
        match self.reasoning.get(n) {
            Some(piece) => (piece, true),
            None => (self.content[(n - self.reasoning.len()) % self.content.len()], false),
        }
    }

    fn usage(&self, given: u64) -> Value {
        let reasoning = (self.reasoning.len() as u64).min(given);
        json!({"prompt_tokens": self.prompt, "total_tokens": self.prompt + given, "completion_tokens": given,
            "prompt_tokens_details": null, "reasoning_tokens": reasoning, "completion_tokens_details": null})
    }
}

fn refuse(message: &str, kind: &str) -> Response<Answer> {
    answer_json(
        StatusCode::BAD_REQUEST,
        &json!({"object": "error", "message": message, "type": kind, "param": null, "code": 400}),
    )
}

pub async fn generate(engine: &Arc<Engine>, request: Request<Incoming>, shape: Shape) -> Response<Answer> {
    let is_json = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.to_ascii_lowercase().starts_with("application/json"));
    let Ok(body) = request.into_body().collect().await.map(http_body_util::Collected::to_bytes) else {
        return refuse("There was an error parsing the body", "Bad Request");
    };
    if !is_json {
        return refuse(
            "1 validation error:\n  {'loc': ['header', 'content-type'], 'msg': \"Unsupported Media Type: Only 'application/json' is allowed\", 'type': 'value_error'}",
            "Bad Request",
        );
    }
    let asked: Asked = match serde_json::from_slice(&body) {
        Ok(asked) => asked,
        Err(error) => {
            return refuse(
                &format!("1 validation error:\n  {{'type': 'json_invalid', 'msg': '{error}'}}"),
                "Bad Request",
            );
        }
    };
    let plan = match plan(engine, &asked, shape) {
        Ok(plan) => plan,
        Err(refusal) => return *refusal,
    };
    let rid = asked.rid.clone().unwrap_or_else(|| plan.id.clone());
    // Dropped by hyper when the client leaves: in the queue and in the prefill too.
    let Some(admitted) = engine.admit(rid, plan.prompt).await else {
        return answer_json(StatusCode::OK, &whole(shape, &plan, 0, "abort"));
    };
    if asked.stream {
        let (pieces, body) = mpsc::channel(EVENTS);
        tokio::spawn(stream(admitted, plan, shape, pieces));
        events(body)
    } else {
        let (given, finish) = all(admitted, &plan).await;
        answer_json(StatusCode::OK, &whole(shape, &plan, given, finish))
    }
}

fn plan(engine: &Engine, asked: &Asked, shape: Shape) -> Result<Plan, Box<Response<Answer>>> {
    static IDS: AtomicU64 = AtomicU64::new(1);
    let missing = |field: &str| {
        let text = format!(
            "1 validation error:\n  {{'type': 'missing', 'loc': ('body', '{field}'), 'msg': 'Field required'}}"
        );
        Box::new(refuse(&text, "Bad Request"))
    };
    let prompt = match shape {
        Shape::Chat => {
            let messages = asked.messages.as_ref().ok_or_else(|| missing("messages"))?;
            messages
                .iter()
                .map(|m| m.content.as_str().map_or_else(|| m.content.to_string(), str::to_owned))
                .collect::<Vec<_>>()
                .join("\n")
        }
        Shape::Text => asked.prompt.as_ref().ok_or_else(|| missing("prompt"))?.to_string(),
        Shape::Native => asked.text.clone().unwrap_or_default(),
    };
    let prompt_tokens = speech::count(&prompt);
    let sampling = asked.sampling_params.as_ref();
    let limit = match shape {
        Shape::Chat => asked.max_completion_tokens.or(asked.max_tokens),
        Shape::Text => asked.max_tokens.or(Some(16)),
        Shape::Native => sampling.and_then(|s| s.max_new_tokens).or(Some(128)),
    };
    let context = engine.args.number("context-length").unwrap_or(CONTEXT);
    if prompt_tokens > context {
        let text =
            format!("The input ({prompt_tokens} tokens) is longer than the model's context length ({context} tokens).");
        return Err(Box::new(refuse(&text, "BadRequestError")));
    }
    if let Some(limit) = limit
        && prompt_tokens + limit > context
    {
        let text = format!(
            "Requested token count exceeds the model's maximum context length of {context} tokens. You requested a total of {} tokens: {prompt_tokens} tokens from the input messages and {limit} tokens for the completion. Please reduce the number of tokens in the input messages or the completion to fit within the limit.",
            prompt_tokens + limit
        );
        return Err(Box::new(refuse(&text, "BadRequestError")));
    }
    let said = speech::answer(&prompt);
    let off = asked.chat_template_kwargs.as_ref().is_some_and(|kwargs| {
        ["thinking", "enable_thinking"].iter().any(|name| kwargs.get(name) == Some(&Value::Bool(false)))
    });
    let thinks = shape == Shape::Chat && !off && engine.args.one("reasoning-parser").is_some();
    let reasoning = if thinks { speech::tokens(said.reasoning) } else { Vec::new() };
    let content = speech::tokens(said.content);
    let natural = (reasoning.len() + content.len()) as u64;
    let ignore_eos = asked.ignore_eos || sampling.is_some_and(|s| s.ignore_eos);
    let limit = limit.unwrap_or(context - prompt_tokens);
    let total = if ignore_eos { limit } else { limit.min(natural) };
    Ok(Plan {
        reasoning,
        content,
        total,
        finish: if total == natural && !ignore_eos { "stop" } else { "length" },
        prompt: prompt_tokens,
        model: asked.model.clone().unwrap_or_else(|| engine.args.served_name().to_owned()),
        id: format!("{:016x}{:016x}", std::process::id(), IDS.fetch_add(1, Ordering::Relaxed)),
        created: crate::observe::clock::unix_seconds(),
        usage: asked.stream_options.as_ref().is_some_and(|options| options.include_usage),
    })
}

/// Waits for all tokens: how many, and why it ended.
async fn all(mut admitted: Admitted, plan: &Plan) -> (u64, &'static str) {
    let mut given = 0;
    while given < plan.total {
        match admitted.next().await {
            Some(tokens) => given = (given + tokens).min(plan.total),
            None => return (given, "abort"),
        }
    }
    admitted.finish(given);
    (given, plan.finish)
}

async fn stream(mut admitted: Admitted, plan: Plan, shape: Shape, pieces: mpsc::Sender<Bytes>) {
    if shape == Shape::Chat
        && pieces
            .send(event(&chat_chunk(
                &plan,
                &json!({"reasoning_content": null, "role": "assistant", "content": ""}),
                None,
            )))
            .await
            .is_err()
    {
        return;
    }
    let mut given = 0;
    let mut so_far = String::new();
    let mut finish = plan.finish;
    while given < plan.total {
        let tokens = tokio::select! {
            tokens = admitted.next() => tokens,
            () = pieces.closed() => return,
        };
        let Some(tokens) = tokens else {
            finish = "abort";
            break;
        };
        for _ in 0..tokens.min(plan.total - given) {
            let (piece, thought) = plan.piece(given);
            given += 1;
            let chunk = match shape {
                Shape::Chat if thought => chat_chunk(&plan, &json!({"reasoning_content": piece}), None),
                Shape::Chat => chat_chunk(&plan, &json!({"reasoning_content": null, "content": piece}), None),
                Shape::Text => text_chunk(&plan, piece, None),
                Shape::Native => {
                    so_far.push_str(piece);
                    native(&plan, &so_far, given, None)
                }
            };
            if pieces.send(event(&chunk)).await.is_err() {
                return;
            }
        }
    }
    if finish != "abort" {
        admitted.finish(given);
    }
    let last = match shape {
        Shape::Chat => chat_chunk(&plan, &json!({"reasoning_content": null}), Some(finish)),
        Shape::Text => text_chunk(&plan, "", Some(finish)),
        Shape::Native => native(&plan, &so_far, given, Some(finish)),
    };
    let _ = pieces.send(event(&last)).await;
    if plan.usage && shape != Shape::Native {
        let object = if shape == Shape::Chat { "chat.completion.chunk" } else { "text_completion" };
        let usage = json!({"id": plan.id, "object": object, "created": plan.created, "model": plan.model,
            "choices": [], "usage": plan.usage(given)});
        let _ = pieces.send(event(&usage)).await;
    }
    let _ = pieces.send(Bytes::from_static(b"data: [DONE]\n\n")).await;
}

fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

fn chat_chunk(plan: &Plan, delta: &Value, finish: Option<&str>) -> Value {
    json!({"id": plan.id, "object": "chat.completion.chunk", "created": plan.created, "model": plan.model,
        "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish, "matched_stop": null}]})
}

fn text_chunk(plan: &Plan, piece: &str, finish: Option<&str>) -> Value {
    json!({"id": plan.id, "object": "text_completion", "created": plan.created, "model": plan.model,
        "choices": [{"index": 0, "text": piece, "logprobs": null, "finish_reason": finish, "matched_stop": null}]})
}

fn native(plan: &Plan, so_far: &str, given: u64, finish: Option<&str>) -> Value {
    json!({"text": so_far, "meta_info": {"id": plan.id, "finish_reason": finish.map(|kind| json!({"type": kind})),
        "prompt_tokens": plan.prompt, "completion_tokens": given, "cached_tokens": 0}})
}

fn whole(shape: Shape, plan: &Plan, given: u64, finish: &str) -> Value {
    let said = |thought: bool| {
        (0..given).map(|n| plan.piece(n)).filter(|(_, t)| *t == thought).map(|(p, _)| p).collect::<String>()
    };
    let versions =
        json!({"weight_version": "default", "weight_versions": [{"version": "default", "start": 0, "end": given}]});
    match shape {
        Shape::Chat => {
            let thoughts = Some(said(true)).filter(|text| !text.is_empty());
            json!({"id": plan.id, "object": "chat.completion", "created": plan.created, "model": plan.model,
                "choices": [{"index": 0, "message": {"role": "assistant", "content": said(false), "reasoning_content": thoughts},
                    "logprobs": null, "finish_reason": finish, "matched_stop": null}],
                "usage": plan.usage(given), "metadata": versions})
        }
        Shape::Text => json!({"id": plan.id, "object": "text_completion", "created": plan.created, "model": plan.model,
            "choices": [{"index": 0, "text": said(false), "logprobs": null, "finish_reason": finish, "matched_stop": null}],
            "usage": plan.usage(given), "metadata": versions}),
        Shape::Native => native(plan, &said(false), given, Some(finish)),
    }
}
