//! Reads the engine's own figures (`/v1/loads`), to see whether they move; what they tell is `figures`'.

use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;

use super::client::{self, Target};
use super::figures::Figures;

/// The engine answers from memory, within milliseconds, unless its event loop is blocked.
const LIMIT: Duration = Duration::from_secs(4);

/// One look. None: no such route, or no answer; that is no evidence of anything.
pub async fn look(engine: SocketAddr, key: Option<&str>) -> Option<Figures> {
    let answer = client::get(&Target::Tcp(engine), "/v1/loads?include=core", key, LIMIT).await.ok()?;
    (answer.status == StatusCode::OK).then(|| Figures::read(&answer.body)).flatten()
}
