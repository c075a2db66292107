//! The beat of the simulated engine: prefills one after another, then a token for every running
//! request at once, each step confirmed by all ranks, so that one stopped or dead rank stops all.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use tokio::sync::mpsc;

use super::knobs::Fault;
use super::logline;
use super::rank::Link;
use super::requests::{Engine, Prefill, Status};

/// Steps a second at most; faster streams get several tokens a step.
const STEPS_PER_SECOND: f64 = 500.0;
/// What one chunk of a prefill takes that is long.
const CHUNK: Duration = Duration::from_secs(2);
/// Decode steps between two log lines (`--decode-log-interval`).
const LOG_INTERVAL: u64 = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Ask the ranks to leave.
    Leave,
    /// Let the last rank raise an exception.
    Raise,
}

#[derive(Debug)]
pub struct Scheduler {
    engine: Arc<Engine>,
    ranks: Vec<Link>,
    running: Vec<Weak<()>>,
    /// All tokens of all streams.
    generated: u64,
    decodes: u64,
    log_rank: Option<u32>,
}

impl Scheduler {
    pub fn new(engine: Arc<Engine>, ranks: Vec<Link>) -> Self {
        let log_rank = (ranks.len() > 1).then_some(0);
        Self { engine, ranks, running: Vec::new(), generated: 0, decodes: 0, log_rank }
    }

    pub async fn run(mut self, mut line: mpsc::Receiver<Prefill>, mut orders: mpsc::Receiver<Order>) {
        let rate = self.engine.knobs.tokens_per_second;
        let steps = rate.min(STEPS_PER_SECOND);
        let mut beat = tokio::time::interval(Duration::from_secs_f64(1.0 / steps));
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Tokens not yet given, as a fraction: 1200 a second are 2.4 a step.
        let mut owed = 0.0;
        loop {
            self.running.retain(|slot| slot.strong_count() > 0);
            self.engine.running.store(self.running.len(), Ordering::Relaxed);
            self.engine.publish();
            let idle = self.running.is_empty();
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(order) => self.obey(order).await,
                    None => return,
                },
                prefill = line.recv() => match prefill {
                    Some(prefill) => self.prefill(prefill).await,
                    None => return,
                },
                _ = beat.tick(), if !idle => {
                    owed += rate / steps;
                    let tokens = owed.floor();
                    owed -= tokens;
                    self.decode(tokens as u64).await;
                }
            }
        }
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::Leave => {
                for rank in &mut self.ranks {
                    rank.leave().await;
                }
            }
            Order::Raise => {
                if let Some(rank) = self.ranks.last_mut() {
                    rank.raise().await;
                }
            }
        }
    }

    /// All ranks, or nothing: a collective operation.
    async fn lockstep(&mut self) {
        for rank in &mut self.ranks {
            rank.begin().await;
        }
        for rank in &mut self.ranks {
            rank.end().await;
        }
        self.engine.received.fetch_add(1, Ordering::Relaxed);
    }

    async fn prefill(&mut self, prefill: Prefill) {
        let queued = self.engine.waiting().saturating_sub(1);
        let chunk = |tokens: u64, running: usize| {
            format!(
                "Prefill batch, #new-seq: 1, #new-token: {tokens}, #cached-token: 0, token usage: 0.00, #running-req: {running}, #queue-req: {queued}, #pending-token: 0, cuda graph: False, input throughput (token/s): 512.00"
            )
        };
        logline::say(self.log_rank, chunk(prefill.tokens, self.running.len()));
        // The probe's own prefill, and the warm-up's, are as quick as ever.
        if prefill.tokens > 1 && self.engine.status() != Status::Starting {
            let silent = self.engine.knobs.find(|f| if let Fault::SlowPrefill(d) = f { Some(d) } else { None });
            tokio::time::sleep(silent.unwrap_or_default()).await;
            let busy = self.engine.knobs.find(|f| if let Fault::BusyPrefill(d) = f { Some(d) } else { None });
            for _ in 0..busy.unwrap_or_default().as_secs().div_ceil(CHUNK.as_secs()) {
                tokio::time::sleep(CHUNK).await;
                logline::say(self.log_rank, chunk(4096, self.running.len()));
            }
        }
        self.lockstep().await;
        if prefill.slot.strong_count() > 0 {
            self.running.push(prefill.slot);
            self.engine.running.store(self.running.len(), Ordering::Relaxed);
        }
        let _ = prefill.done.send(());
    }

    /// What a decode line says of draft tokens, where some are drafted.
    fn speculation(&self) -> &'static str {
        if self.engine.args.one("speculative-algorithm").is_none() {
            ""
        } else if self.engine.knobs.has(Fault::IdleSpeculation) {
            ", accept len: 1.00, accept rate: 0.00"
        } else {
            ", accept len: 2.70, accept rate: 0.57"
        }
    }

    async fn decode(&mut self, tokens: u64) {
        for fault in self.engine.knobs.faults.clone() {
            if matches!(fault, Fault::StallAfterTokens(limit) if self.generated >= limit) {
                std::future::pending::<()>().await;
            }
            let (limit, signal) = match fault {
                Fault::DieAfterTokens(limit) => (limit, Signal::SIGKILL),
                Fault::HangAfterTokens(limit) => (limit, Signal::SIGSTOP),
                _ => continue,
            };
            if self.generated >= limit
                && let Some(rank) = self.ranks.last()
            {
                let _ = kill(rank.pid, signal);
                // What is signalled may still answer once: the step must not count.
                std::future::pending::<()>().await;
            }
        }
        self.lockstep().await;
        let running = self.running.len() as u64;
        self.generated += tokens * running;
        self.decodes += 1;
        if self.decodes.is_multiple_of(LOG_INTERVAL) {
            let speculation = self.speculation();
            logline::say(
                self.log_rank,
                format!(
                    "Decode batch, #running-req: {running}, #token: {}, token usage: 0.00{speculation}, cuda graph: True, gen throughput (token/s): {:.2}, #queue-req: {}",
                    self.generated,
                    self.engine.knobs.tokens_per_second * running as f64,
                    self.engine.waiting()
                ),
            );
        }
        self.engine.steps.send_modify(|given| *given += tokens);
    }
}
