//! Server-sent events, as far as a client of OpenAI's streams needs them.

/// The longest event taken; one of the engine's is some hundred bytes.
const MAX_EVENT: usize = 8 << 20;

/// Cuts a byte stream into the `data` of its events.
#[derive(Debug, Default)]
pub struct Events {
    rest: Vec<u8>,
    data: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event was longer than {MAX_EVENT} bytes")]
pub struct TooLong;

impl Events {
    /// Takes what was read; `each` gets the data of every event that is complete.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) -> Result<(), TooLong> {
        self.rest.extend_from_slice(bytes);
        let mut from = 0;
        while let Some(end) = memchr::memchr(b'\n', &self.rest[from..]) {
            let line = &self.rest[from..from + end];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            from += end + 1;
            if line.is_empty() {
                if !self.data.is_empty() {
                    each(&self.data);
                    self.data.clear();
                }
            } else if let Some(data) = line.strip_prefix(b"data:") {
                if !self.data.is_empty() {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            }
        }
        self.rest.drain(..from);
        if self.rest.len() + self.data.len() > MAX_EVENT { Err(TooLong) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_may_be_cut_anywhere() {
        let text = b": keep-alive\n\ndata: {\"a\":\r\ndata: 1}\r\n\r\nevent: x\ndata:[DONE]\n\nid: 7\n\n";
        for cut in 1..text.len() {
            let mut events = Events::default();
            let mut seen = Vec::new();
            for chunk in text.chunks(cut) {
                events.push(chunk, |data| seen.push(String::from_utf8_lossy(data).into_owned())).expect("short");
            }
            assert_eq!(seen, ["{\"a\":\n1}", "[DONE]"], "cut each {cut} bytes");
        }
    }
}
