//! What the engine's answers told in passing: how long tokens took, how many came, why they ended.
//!
//! By route and key, made when the first answer of a kind has something to tell.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::histogram::{self, Bounds, Histogram, Pick};
use super::{Counters, Label, begin, key_label, line};
use crate::proxy::routes;
use crate::proxy::sse::{Facts, Reason};

/// Keys with lines of their own here, fewer than with requests: two histograms are long.
const KEYS: usize = 128;

/// Upper bounds in seconds of the time between two tokens: from a batch of speculated ones to a
/// decode that stands behind a long prefill.
static GAPS: Bounds = [0.001, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// Where the number of an answer's tokens comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counted {
    Usage,
    /// The engine told no usage, so events stand for tokens: the first and the last of a stream mostly
    /// hold none, and one may hold several.
    Events,
}

impl Counted {
    const ALL: [Self; 2] = [Self::Usage, Self::Events];

    fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::Events => "events",
        }
    }
}

/// What the answers to one key's requests for one route told.
#[derive(Debug)]
pub struct Series {
    first: Histogram,
    gaps: Histogram,
    prompt: AtomicU64,
    completion: [AtomicU64; Counted::ALL.len()],
    reasons: [AtomicU64; Reason::ALL.len()],
}

impl Default for Series {
    fn default() -> Self {
        Self {
            first: Histogram::default(),
            gaps: Histogram::new(&GAPS),
            prompt: AtomicU64::new(0),
            completion: Default::default(),
            reasons: Default::default(),
        }
    }
}

impl Series {
    /// The first event, so long after the request came, and `more` that came in one piece with it.
    pub fn first(&self, took: Duration, more: u64) {
        self.first.observe(took);
        self.gaps.observe_none(more);
    }

    /// An event so long after the one before it, and `more` that came in one piece with it.
    pub fn later(&self, took: Duration, more: u64) {
        self.gaps.observe(took);
        self.gaps.observe_none(more);
    }

    /// What an answer told until its end.
    pub fn over(&self, facts: &Facts, events: u64) {
        self.prompt.fetch_add(facts.prompt.unwrap_or(0), Relaxed);
        let (tokens, counted) = facts.completion.map_or((events, Counted::Events), |tokens| (tokens, Counted::Usage));
        self.completion[counted as usize].fetch_add(tokens, Relaxed);
        if let Some(reason) = facts.reason {
            self.reasons[reason as usize].fetch_add(1, Relaxed);
        }
    }
}

type ByRoute = Box<[OnceLock<Box<Series>>]>;

/// The series of one worker, by key and then by route.
#[derive(Debug)]
pub struct Told(Box<[OnceLock<ByRoute>]>);

impl Default for Told {
    fn default() -> Self {
        Self((0..=KEYS).map(|_| OnceLock::new()).collect())
    }
}

impl Told {
    pub fn series(&self, label: Label) -> &Series {
        let routes = self.0[(label.key.0 as usize).min(KEYS)]
            .get_or_init(|| (0..=routes::COUNT).map(|_| OnceLock::new()).collect());
        // What is no route of the engine has no answer of it.
        routes[label.row.min(routes::COUNT)].get_or_init(Box::default)
    }

    fn find(&self, key: usize, row: usize) -> Option<&Series> {
        Some(self.0[key].get()?[row].get()?)
    }
}

/// Adds what all workers were told to the page.
pub fn write(out: &mut String, workers: &[Arc<Counters>], names: &[String]) {
    let mut found: Vec<(String, Vec<&Series>)> = Vec::new();
    for key in 0..=KEYS {
        for row in 0..routes::COUNT {
            let parts: Vec<&Series> = workers.iter().filter_map(|worker| worker.told.find(key, row)).collect();
            if !parts.is_empty() {
                let key = key_label(key, KEYS, names);
                found.push((format!("route=\"{}\"{key}", Label::name(row)), parts));
            }
        }
    }
    if found.is_empty() {
        return;
    }
    let histograms: [(&str, &str, Pick<Series>); 2] = [
        ("time_to_first_token_seconds", "From a request's arrival to the first event of its stream.", |s| &s.first),
        ("inter_token_seconds", "Between two events of a stream.", |s| &s.gaps),
    ];
    for (name, help, pick) in histograms {
        begin(out, name, "histogram", help);
        for (labels, parts) in &found {
            let parts: Vec<&Histogram> = parts.iter().map(|part| pick(part)).collect();
            // An answer that is no stream tells tokens and no times.
            if parts.iter().any(|part| part.count() > 0) {
                histogram::write(out, name, labels, &parts);
            }
        }
    }
    let counter = |out: &mut String, name: &str, labels: &str, parts: &[&Series], pick: &dyn Fn(&Series) -> u64| {
        let count: u64 = parts.iter().map(|part| pick(part)).sum();
        if count > 0 {
            line(out, name, &format!("{{{labels}}}"), count);
        }
    };
    let name = "prompt_tokens_total";
    begin(out, name, "counter", "Tokens of prompts, as usage tells.");
    for (labels, parts) in &found {
        counter(out, name, labels, parts, &|series| series.prompt.load(Relaxed));
    }
    let name = "completion_tokens_total";
    begin(out, name, "counter", "Tokens of answers, as usage tells, or else their events.");
    for (labels, parts) in &found {
        for counted in Counted::ALL {
            let labels = format!("{labels},counted=\"{}\"", counted.name());
            counter(out, name, &labels, parts, &|series| series.completion[counted as usize].load(Relaxed));
        }
    }
    let name = "finish_reasons_total";
    begin(out, name, "counter", "Answers by the reason that the engine gave for their end.");
    for (labels, parts) in &found {
        for reason in Reason::ALL {
            let labels = format!("{labels},reason=\"{}\"", reason.name());
            counter(out, name, &labels, parts, &|series| series.reasons[reason as usize].load(Relaxed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::KeyId;
    use crate::proxy::sse::{Grammar, Scanner, Words};

    #[test]
    fn the_page_tells_by_route_and_key_what_all_workers_were_told() {
        let workers = [Arc::new(Counters::default()), Arc::new(Counters::default())];
        let label = |key| match routes::Table::default().decide("/v1/chat/completions").0 {
            routes::Decision::Engine(route) => Label::route(route).of(KeyId(key)),
            _ => unreachable!("an inference route"),
        };
        let mut scanner = Scanner::new(Grammar::Events, Words::Common);
        let events =
            scanner.scan(b"data: {\"finish_reason\":\"stop\",\"prompt_tokens\":4,\"completion_tokens\":7}\n\n");
        for worker in &workers {
            let series = worker.told.series(label(1));
            series.first(Duration::from_millis(40), 0);
            series.later(Duration::from_millis(12), 2);
            series.over(scanner.facts(), events);
        }
        workers[0].told.series(label(0)).over(Scanner::new(Grammar::Events, Words::Common).facts(), 3);
        workers[0].told.series(label(5000)).later(Duration::from_mins(1), 0);
        let mut page = String::new();
        write(&mut page, &workers, &[String::new(), "ci".to_owned()]);
        let shown: Vec<&str> = page
            .lines()
            .filter(|line| !line.contains("_bucket") || line.contains("\"0.0") || line.contains("Inf"))
            .collect();
        insta::assert_snapshot!(shown.join("\n"));
    }
}
