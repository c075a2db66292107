//! What a client of a stream reads in place of an answer's rest, in the words of each dialect.

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};

use super::error_object;
use crate::proxy::routes::Dialect;

/// What errors of this proxy in mid-stream are called.
const KIND: &str = "api_error";
const CODE: &str = "stream_interrupted";

/// An error as one event. It begins with an empty line, which ends an event that was cut in its
/// middle, so that this one is read as one.
pub(super) fn error_event(dialect: Dialect, kind: &str, code: &Value, message: &str) -> Bytes {
    let text = match dialect {
        Dialect::OpenAi => format!("\n\ndata: {}\n\n", json!({ "error": error_object(message, kind, code) })),
        Dialect::Anthropic => {
            let event = json!({ "type": "error", "error": { "type": kind, "message": message } });
            format!("\n\nevent: error\ndata: {event}\n\n")
        }
        Dialect::Responses => {
            let event = json!({ "type": "error", "code": code, "message": message, "param": null });
            format!("\n\nevent: error\ndata: {event}\n\n")
        }
        Dialect::Lines => format!("\n{}\n", json!({ "error": message })),
    };
    Bytes::from(text)
}

/// The last event of a stream that is not complete.
pub fn last_event(dialect: Dialect, message: &str) -> Bytes {
    error_event(dialect, KIND, &CODE.into(), message)
}

/// Longest message taken from an answer of the engine that is no JSON.
const LONGEST: usize = 1024;

/// The engine's answer with an error, to a client whose stream has begun. Its shapes are OpenAI's,
/// Anthropic's, its own (the fields without an object around them) and FastAPI's.
pub fn engines_error(dialect: Dialect, status: StatusCode, body: &[u8]) -> Bytes {
    let said: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = said.get("error").filter(|error| error.is_object()).unwrap_or(&said);
    let text = |name: &str| error.get(name).and_then(Value::as_str);
    let plain = || {
        let text = String::from_utf8_lossy(&body[..body.len().min(LONGEST)]);
        if text.trim().is_empty() { status.to_string() } else { format!("{status}: {}", text.trim()) }
    };
    let message = text("message").or_else(|| said.get("error")?.as_str()).or_else(|| said.get("detail")?.as_str());
    let message = message.map_or_else(plain, str::to_owned);
    let kind = text("type").filter(|kind| *kind != "error").unwrap_or(match status.as_u16() {
        400..500 => "invalid_request_error",
        _ => KIND,
    });
    let code = error.get("code").filter(|code| !code.is_null()).cloned();
    error_event(dialect, kind, &code.unwrap_or_else(|| status.as_u16().into()), &message)
}

/// What is said between two events so that a connection on which nothing happens is not taken for
/// dead; none where the dialect has no such thing.
pub fn keep_alive(dialect: Dialect) -> Option<Bytes> {
    match dialect {
        Dialect::OpenAi | Dialect::Responses => Some(Bytes::from_static(b": keep-alive\n\n")),
        Dialect::Anthropic => Some(Bytes::from_static(b"event: ping\ndata: {\"type\": \"ping\"}\n\n")),
        Dialect::Lines => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_dialect_ends_in_its_own_shape_and_without_done() {
        let openai = r#"{"error":{"message":"gone","type":"api_error","param":null,"code":"stream_interrupted"}}"#;
        assert_eq!(last_event(Dialect::OpenAi, "gone"), format!("\n\ndata: {openai}\n\n"));
        let anthropic = r#"{"type":"error","error":{"type":"api_error","message":"gone"}}"#;
        assert_eq!(last_event(Dialect::Anthropic, "gone"), format!("\n\nevent: error\ndata: {anthropic}\n\n"));
        let responses = r#"{"type":"error","code":"stream_interrupted","message":"gone","param":null}"#;
        assert_eq!(last_event(Dialect::Responses, "gone"), format!("\n\nevent: error\ndata: {responses}\n\n"));
        assert_eq!(last_event(Dialect::Lines, "gone"), "\n{\"error\":\"gone\"}\n");
    }

    #[test]
    fn the_engines_words_are_kept_whatever_their_shape() {
        let event = |status: u16, body: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            String::from_utf8(engines_error(Dialect::OpenAi, status, body.as_bytes()).to_vec()).unwrap()
        };
        let own = r#"{"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}"#;
        insta::assert_snapshot!(event(400, own).trim(), @r#"data: {"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}"#);
        let nested = r#"{"type":"error","error":{"type":"overloaded_error","message":"busy"}}"#;
        insta::assert_snapshot!(event(503, nested).trim(), @r#"data: {"error":{"message":"busy","type":"overloaded_error","param":null,"code":503}}"#);
        insta::assert_snapshot!(event(404, r#"{"detail":"Not Found"}"#).trim(), @r#"data: {"error":{"message":"Not Found","type":"invalid_request_error","param":null,"code":404}}"#);
        insta::assert_snapshot!(event(401, r#"{"error":"Unauthorized"}"#).trim(), @r#"data: {"error":{"message":"Unauthorized","type":"invalid_request_error","param":null,"code":401}}"#);
        insta::assert_snapshot!(event(500, "Internal Server Error").trim(), @r#"data: {"error":{"message":"500 Internal Server Error: Internal Server Error","type":"api_error","param":null,"code":500}}"#);
        insta::assert_snapshot!(event(502, "").trim(), @r#"data: {"error":{"message":"502 Bad Gateway","type":"api_error","param":null,"code":502}}"#);
    }
}
