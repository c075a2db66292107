//! The ways to ask the simulated engine for text: what a request may say, what it is answered.

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
use super::messages::{self, Block, Events, Head};
use super::requests::{Engine, Request as Admitted};
use super::speech;

/// The model's context length, unless `--context-length` says another.
pub const CONTEXT: u64 = 32_768;

/// Events that wait for a slow reader before the stream's task waits too.
const EVENTS: usize = 64;

/// Which answer a generation has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Chat,
    /// Anthropic's.
    Messages,
    Text,
    Native,
}

/// What a request may ask; all else is accepted and has no effect.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Asked {
    model: Option<String>,
    messages: Option<Vec<Message>>,
    system: Value,
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
    thinking: Value,
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

    fn head(&self) -> Head {
        Head { id: self.id.clone(), model: self.model.clone(), prompt: self.prompt }
    }
}

fn refuse(shape: Shape, message: &str, kind: &str) -> Response<Answer> {
    if shape == Shape::Messages {
        return messages::refuse(message);
    }
    answer_json(
        StatusCode::BAD_REQUEST,
        &json!({"object": "error", "message": message, "type": kind, "param": null, "code": 400}),
    )
}

pub async fn generate(engine: &Arc<Engine>, request: Request<Incoming>, shape: Shape) -> Response<Answer> {
    let asked = match asked(request, shape).await {
        Ok(asked) => asked,
        Err(refusal) => return *refusal,
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

/// `/v1/messages/count_tokens`.
pub async fn count_tokens(request: Request<Incoming>) -> Response<Answer> {
    let asked = asked(request, Shape::Messages).await;
    match asked.and_then(|asked| prompt(&asked, Shape::Messages)) {
        Ok(prompt) => answer_json(StatusCode::OK, &json!({"input_tokens": speech::count(&prompt)})),
        Err(refusal) => *refusal,
    }
}

async fn asked(request: Request<Incoming>, shape: Shape) -> Result<Asked, Box<Response<Answer>>> {
    let is_json = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.to_ascii_lowercase().starts_with("application/json"));
    let Ok(body) = request.into_body().collect().await.map(http_body_util::Collected::to_bytes) else {
        return Err(Box::new(refuse(shape, "There was an error parsing the body", "Bad Request")));
    };
    if !is_json {
        return Err(Box::new(refuse(
            shape,
            "1 validation error:\n  {'loc': ['header', 'content-type'], 'msg': \"Unsupported Media Type: Only 'application/json' is allowed\", 'type': 'value_error'}",
            "Bad Request",
        )));
    }
    serde_json::from_slice(&body).map_err(|error| {
        let text = format!("1 validation error:\n  {{'type': 'json_invalid', 'msg': '{error}'}}");
        Box::new(refuse(shape, &text, "Bad Request"))
    })
}

/// The whole prompt as one text.
fn prompt(asked: &Asked, shape: Shape) -> Result<String, Box<Response<Answer>>> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Ok(match shape {
        Shape::Chat | Shape::Messages => {
            let messages = asked.messages.as_ref().ok_or_else(|| missing(shape, "messages"))?;
            let system = Some(&asked.system).filter(|system| !system.is_null());
            system.into_iter().chain(messages.iter().map(|m| &m.content)).map(text).collect::<Vec<_>>().join("\n")
        }
        Shape::Text => asked.prompt.as_ref().ok_or_else(|| missing(shape, "prompt"))?.to_string(),
        Shape::Native => asked.text.clone().unwrap_or_default(),
    })
}

fn missing(shape: Shape, field: &str) -> Box<Response<Answer>> {
    let text =
        format!("1 validation error:\n  {{'type': 'missing', 'loc': ('body', '{field}'), 'msg': 'Field required'}}");
    Box::new(refuse(shape, &text, "Bad Request"))
}

fn plan(engine: &Engine, asked: &Asked, shape: Shape) -> Result<Plan, Box<Response<Answer>>> {
    static IDS: AtomicU64 = AtomicU64::new(1);
    let prompt = prompt(asked, shape)?;
    let prompt_tokens = speech::count(&prompt);
    let sampling = asked.sampling_params.as_ref();
    let limit = match shape {
        Shape::Chat => asked.max_completion_tokens.or(asked.max_tokens),
        Shape::Messages => Some(asked.max_tokens.ok_or_else(|| missing(shape, "max_tokens"))?),
        Shape::Text => asked.max_tokens.or(Some(16)),
        Shape::Native => sampling.and_then(|s| s.max_new_tokens).or(Some(128)),
    };
    let context = engine.args.number("context-length").unwrap_or(CONTEXT);
    if prompt_tokens > context {
        let text =
            format!("The input ({prompt_tokens} tokens) is longer than the model's context length ({context} tokens).");
        return Err(Box::new(refuse(shape, &text, "BadRequestError")));
    }
    if let Some(limit) = limit
        && prompt_tokens + limit > context
    {
        let text = format!(
            "Requested token count exceeds the model's maximum context length of {context} tokens. You requested a total of {} tokens: {prompt_tokens} tokens from the input messages and {limit} tokens for the completion. Please reduce the number of tokens in the input messages or the completion to fit within the limit.",
            prompt_tokens + limit
        );
        return Err(Box::new(refuse(shape, &text, "BadRequestError")));
    }
    let said = speech::answer(&prompt);
    let off = asked.thinking["type"] == "disabled"
        || asked.chat_template_kwargs.as_ref().is_some_and(|kwargs| {
            ["thinking", "enable_thinking"].iter().any(|name| kwargs.get(name) == Some(&Value::Bool(false)))
        });
    let thinks =
        matches!(shape, Shape::Chat | Shape::Messages) && !off && engine.args.one("reasoning-parser").is_some();
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
    let mut blocks = Events::new(plan.head());
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
                Shape::Chat if thought => event(&chat_chunk(&plan, &json!({"reasoning_content": piece}), None)),
                Shape::Chat => event(&chat_chunk(&plan, &json!({"reasoning_content": null, "content": piece}), None)),
                Shape::Messages => blocks.piece(piece, if thought { Block::Thinking } else { Block::Text }),
                Shape::Text => event(&text_chunk(&plan, piece, None)),
                Shape::Native => {
                    so_far.push_str(piece);
                    event(&native(&plan, &so_far, given, None))
                }
            };
            if pieces.send(chunk).await.is_err() {
                return;
            }
        }
    }
    if finish != "abort" {
        admitted.finish(given);
    }
    let last = match shape {
        Shape::Chat => chat_chunk(&plan, &json!({"reasoning_content": null}), Some(finish)),
        Shape::Messages => {
            // Anthropic's streams have no `[DONE]`.
            let _ = pieces.send(blocks.end(given, finish)).await;
            return;
        }
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
        Shape::Messages => plan.head().whole(&said(true), &said(false), given, finish),
        Shape::Text => json!({"id": plan.id, "object": "text_completion", "created": plan.created, "model": plan.model,
            "choices": [{"index": 0, "text": said(false), "logprobs": null, "finish_reason": finish, "matched_stop": null}],
            "usage": plan.usage(given), "metadata": versions}),
        Shape::Native => native(plan, &said(false), given, Some(finish)),
    }
}
