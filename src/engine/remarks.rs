//! What the engine's figures say that its operator did not mean: draft tokens that are never taken, a KV
//! cache without room, a prefix cache that never hits, kernels compiled anew at each start.
//!
//! The engine says each of these in its log, in lines that nobody reads, and goes on serving, slowly. Pure:
//! lines in, remarks out. A remark goes when it is no longer true.

use super::log::Fact;
use super::resolve::{Resolved, YamlValue};

/// Batch lines of the engine over which a mean is taken; each stands for 40 steps.
const WINDOW: usize = 32;
/// So many must have come before anything is said.
const ENOUGH: usize = 24;
/// A step of speculative decoding that takes no draft token yields one token; so little more is noise.
const NO_DRAFT_TAKEN: f32 = 1.05;
/// Without a single hit over so many prompts and tokens, the prefix cache does nothing. Prompts of one
/// application begin alike.
const PROMPTS: u64 = 256;
const TOKENS: u64 = 256 << 10;
/// A request that gets less of the KV cache than this is hardly served.
const ROOM: u64 = 1024;

/// What is remarkable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    SpeculationIdle,
    KvCacheSmall,
    PrefixCacheIdle,
    KernelsCold,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::SpeculationIdle, Self::KvCacheSmall, Self::PrefixCacheIdle, Self::KernelsCold];

    /// In status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::SpeculationIdle => "speculation_idle",
            Self::KvCacheSmall => "kv_cache_small",
            Self::PrefixCacheIdle => "prefix_cache_idle",
            Self::KernelsCold => "kernels_cold",
        }
    }
}

/// One of them, in a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    pub kind: Kind,
    pub sentence: String,
}

/// What the flags lead to expect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// The algorithm that drafts tokens, if any.
    pub speculation: Option<String>,
    pub prefix_cache: PrefixCache,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PrefixCache {
    #[default]
    On,
    Off,
}

impl Expected {
    pub fn of(flags: &Resolved) -> Self {
        let word = |name: &str| {
            let said = flags.yaml.iter().find(|(flag, _)| flag == name).and_then(|(_, value)| match value {
                YamlValue::Word(word) => Some(word.clone()),
                YamlValue::Words(words) => words.first().cloned(),
                YamlValue::True => None,
            });
            let spelled = format!("--{name}");
            let mut words = flags.argv.iter();
            let argued = words.find_map(|argument| match argument.strip_prefix(&spelled)? {
                "" => Some(String::new()),
                rest => rest.strip_prefix('=').map(str::to_owned),
            });
            let argued = argued.and_then(|word| if word.is_empty() { words.next().cloned() } else { Some(word) });
            argued.or(said).filter(|word| !matches!(word.to_lowercase().as_str(), "none" | "null" | ""))
        };
        let off = flags.yaml.iter().any(|(flag, value)| flag == "disable-radix-cache" && *value == YamlValue::True)
            || flags.argv.iter().any(|word| word == "--disable-radix-cache");
        Self {
            speculation: word("speculative-algorithm"),
            prefix_cache: if off { PrefixCache::Off } else { PrefixCache::On },
        }
    }
}

/// What one engine has said of itself.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// The accept lengths of the last decode lines; 1 where a line has none.
    accepted: std::collections::VecDeque<f32>,
    kv: Option<KvCache>,
    /// New prompts and their tokens since a token was last found in the prefix cache.
    prompts_missed: u64,
    tokens_missed: u64,
}

#[derive(Debug, Clone, Copy)]
struct KvCache {
    tokens: u64,
    requests: u64,
    chunk: u64,
}

impl Figures {
    /// Takes a line in, by the fact that it states.
    pub fn observe(&mut self, fact: Fact, message: &[u8]) {
        match fact {
            Fact::DecodeBatch { .. } => {
                if self.accepted.len() == WINDOW {
                    self.accepted.pop_front();
                }
                self.accepted.push_back(decimal(message, b", accept len: ").unwrap_or(1.0));
            }
            Fact::PrefillBatch { .. } => {
                let of = |name: &[u8]| whole(message, name).unwrap_or(0);
                let new = of(b"#new-token: ");
                if of(b"#cached-token: ") > 0 {
                    (self.prompts_missed, self.tokens_missed) = (0, 0);
                } else if new > 1 {
                    // One token is a probe's.
                    self.prompts_missed += of(b"#new-seq: ");
                    self.tokens_missed += new;
                }
            }
            Fact::SchedulerReady => {
                let of = |name: &[u8]| whole(message, name);
                if let (Some(tokens), Some(requests)) = (of(b"max_total_num_tokens="), of(b"max_running_requests=")) {
                    // -1: prompts are not cut in chunks.
                    let chunk = of(b"chunked_prefill_size=").unwrap_or(0);
                    self.kv = Some(KvCache { tokens, requests: requests.max(1), chunk });
                }
            }
            _ => {}
        }
    }

    /// What there is to say at this moment.
    pub fn remarks(&self, expected: &Expected) -> Vec<Remark> {
        let speculation = expected.speculation.as_deref().and_then(|algorithm| self.speculation(algorithm));
        let prefix = match expected.prefix_cache {
            PrefixCache::On => self.prefix_cache(),
            PrefixCache::Off => None,
        };
        [speculation, self.kv.and_then(KvCache::remark), prefix].into_iter().flatten().collect()
    }

    fn speculation(&self, algorithm: &str) -> Option<Remark> {
        let mean = self.accepted.iter().sum::<f32>() / self.accepted.len().max(1) as f32;
        (self.accepted.len() >= ENOUGH && mean < NO_DRAFT_TAKEN).then(|| Remark {
            kind: Kind::SpeculationIdle,
            sentence: format!(
                "speculative decoding ({algorithm}) does nothing: its accept length is {mean:.2} over the last {} \
                 batch lines, so no draft token is taken; each step costs more than without it. The draft weights \
                 do not fit the model, or are not there",
                self.accepted.len()
            ),
        })
    }

    fn prefix_cache(&self) -> Option<Remark> {
        (self.prompts_missed >= PROMPTS && self.tokens_missed >= TOKENS).then(|| Remark {
            kind: Kind::PrefixCacheIdle,
            sentence: format!(
                "the prefix cache does nothing: none of the last {} prompts ({} tokens) found a token of its in it. \
                 Prompts that differ from their first tokens on (a time, a request's id) do that",
                self.prompts_missed, self.tokens_missed
            ),
        })
    }
}

impl KvCache {
    fn remark(self) -> Option<Remark> {
        let Self { tokens, requests, chunk } = self;
        let each = tokens / requests;
        // The engine's own default allows thousands of requests at once, and means no promise with it.
        let told = if each < ROOM && requests <= 512 {
            format!("{each} for each of {requests} requests (max-running-requests)")
        } else if tokens < chunk.max(ROOM) {
            format!("not even one chunk of a prompt ({chunk})")
        } else {
            return None;
        };
        Some(Remark {
            kind: Kind::KvCacheSmall,
            sentence: format!(
                "the KV cache holds only {tokens} tokens, {told}: mem-fraction-static leaves hardly any room beside \
                 the weights. Raise it, or lower max-running-requests"
            ),
        })
    }
}

fn after<'a>(message: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let at = memchr::memmem::find(message, name)?;
    Some(&message[at + name.len()..])
}

fn whole(message: &[u8], name: &[u8]) -> Option<u64> {
    let rest = after(message, name)?;
    let digits = rest.iter().take_while(|c| c.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

fn decimal(message: &[u8], name: &[u8]) -> Option<f32> {
    let rest = after(message, name)?;
    let digits = rest.iter().take_while(|c| c.is_ascii_digit() || **c == b'.').count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests;
