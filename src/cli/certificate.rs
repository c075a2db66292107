//! Whether the certificate that the configuration names can be used, before anything starts.

use jiff::Timestamp;

use crate::config::Loaded;
use crate::proxy::Identity;

/// What is not as it should be though it works, or the mistake in one line: who said it, and the file.
pub fn check(loaded: &Loaded) -> Result<Vec<String>, String> {
    let Some(files) = &loaded.config.listen.tls else { return Ok(Vec::new()) };
    let now = Timestamp::now();
    Identity::load(files, now).map(|identity| identity.warnings(now)).map_err(|error| {
        let key = error.key();
        let said = loaded.origins.iter().find(|origin| origin.key == key).map(|origin| origin.from.as_str());
        format!("sglangd: {}: `{key}`: {error}\n", said.unwrap_or("configuration"))
    })
}
