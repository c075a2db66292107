//! Carries out what `step` wishes and reports back what happens: the only file that does both.
//!
//! One task owns the machine and everything it moves. All else (watchers, the fetch, the proxy's
//! link) sends it messages, and reads what it publishes.

mod act;
mod bundle;
mod duty;
mod node;
mod outside;
mod tell;
mod vigil;

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::acquire::{Acquired, Means};
use super::ahead::Reading;
use super::cause::Cause;
use super::fetcher::Current;
use super::half::{Half, HalfView, Orders};
use super::loading::Loading;
use super::look::Look;
use super::oversight::{Decided, News, Oversight, Question, Wanted};
use super::prepare::Prepared;
use super::releasing::{Room, Uses};
use super::report::{Facts, Systemd, headline};
use super::running::{Notice, Running, Stuck};
use super::step::{Action, Event, Millis, State};
use crate::config::Config;
use crate::engine::env::Env;
use crate::engine::remarks::Expected;
use crate::health::figures::Figures;
use crate::health::probe::Pulse;
use crate::launch::beside::Beside;
use crate::launch::guard::Guarded;
use crate::launch::output::Said;
use crate::launch::spawner::Spawner;
use crate::link::status::{Listening, RankStatus, ReadAhead, Status, WeightsStatus};
use crate::link::{EngineView, ProxySettings};
use crate::node::gpus::{self, Gpus, Source};
use crate::shutdown::{Signals, Wish};
use crate::weights::Progress;
use crate::weights::ahead::Ahead;

/// Results of the driver's own tasks: one of each kind at a time.
const REPORTS: usize = 32;
/// Facts of the log; a start of eight ranks says some hundred within a second.
const FACTS: usize = 1024;
/// Steps of a download's bar, four a second.
const STEPS: usize = 16;
/// How often the driver looks at everything by itself.
const BEAT: Duration = Duration::from_secs(1);

/// What the proxy and the guard may take to end when the engine is gone: milliseconds.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the driver's own tasks report.
#[derive(Debug)]
enum Report {
    Acquired(Result<Acquired, Cause>),
    Prepared(Result<Box<Prepared>, Cause>),
    Examined {
        /// The process that it is about.
        of: i32,
        cause: Cause,
    },
    Pulse(Pulse),
    /// None: it could not be made.
    Looked(Option<Box<Look>>),
    Figures {
        of: i32,
        figures: Figures,
    },
    Notice(Notice),
    TreeEmpty,
    Released {
        roll: u16,
    },
    Held {
        roll: u16,
    },
    Gpus(gpus::Look),
    Bundled(Result<PathBuf, String>),
    Order(Order),
}

use node::NodeFacts;
use outside::policy;
pub use outside::{Order, Orderly, Outlook, Outside, Reload};

/// What the driver's loop woke up for.
enum Turn {
    Wish(Wish),
    Report(Report),
    Said(Said),
    Step(Progress),
    Phase(String),
    Ahead(Ahead),
    Traffic,
    Due,
    Beat,
}

#[derive(Debug)]
pub struct Driver {
    oversight: Oversight,
    born: Instant,
    /// The end of the loop's last turn.
    awake: Instant,
    means: Means,
    spawner: Spawner,
    listen: Listening,
    guard: Option<Guarded<std::process::ChildStdin>>,
    signals: Signals,
    reload: Reload,

    half: Half,
    half_view: watch::Receiver<HalfView>,
    settings: watch::Sender<ProxySettings>,
    engine_view: watch::Sender<EngineView>,
    status: watch::Sender<Status>,
    systemd: Systemd,
    headline: String,

    reports: mpsc::Sender<Report>,
    inbox: mpsc::Receiver<Report>,
    said: mpsc::Sender<Said>,
    hearing: mpsc::Receiver<Said>,
    steps: mpsc::Sender<Progress>,
    downloading: mpsc::Receiver<Progress>,
    phases: mpsc::Sender<String>,
    phasing: mpsc::Receiver<String>,

    current: Current,
    /// Imports ahead of the engine while weights are fetched.
    warming: Beside,
    /// Reads shards ahead of the engine while its ranks start.
    reading: Option<Reading>,
    read_ahead: Option<ReadAhead>,
    ahead: mpsc::Sender<Ahead>,
    hearing_ahead: mpsc::Receiver<Ahead>,
    stuck: Stuck,
    acquiring: Option<tokio::task::JoinHandle<()>>,
    acquired: Option<Acquired>,
    preparing: Option<tokio::task::JoinHandle<()>>,
    prepared: Option<Box<Prepared>>,
    engine: Option<Running>,
    loading: Loading,
    weights: Option<WeightsStatus>,
    cause: Option<Cause>,
    /// What is told of a failure whose examination takes too long.
    unexamined: Option<Cause>,
    last_exit: Option<String>,
    ranks: Vec<RankStatus>,
    warnings: Vec<String>,
    room: Room,
    /// Of the engine that was launched last, until its GPUs are free.
    uses: Option<Uses>,
    node: NodeFacts,
    /// Where the last bundle lies.
    bundle: Option<PathBuf>,
    /// Cancelled when nobody is to wait for the GPUs any longer.
    hurry: CancellationToken,
    vigil: vigil::Vigil,
    /// How often a hang was suspected.
    suspicions: u64,
    /// What the flags lead to expect of the engine's figures.
    expected: Expected,
    exit: Option<u8>,
}

impl Driver {
    /// Starts the proxy; the engine follows with [`Driver::run`].
    pub fn new(outside: Outside) -> (Self, Outlook) {
        let Outside { loaded, folders, own_env, inspect_arguments, spawner, listeners, listen, guard, signals, reload } =
            outside;
        let config = loaded.config.clone();
        let warnings = loaded.warnings.clone();
        let oversight = Oversight::new(policy(&config), outside::patience(&config));
        let (reports, inbox) = mpsc::channel(REPORTS);
        let (said, hearing) = mpsc::channel(FACTS);
        let (steps, downloading) = mpsc::channel(STEPS);
        let (phases, phasing) = mpsc::channel(STEPS);
        let (ahead, hearing_ahead) = mpsc::channel(STEPS);
        let means = Means { loaded, folders, own_env: own_env.clone(), inspect_arguments };

        let facts = Facts {
            machine: &oversight.machine,
            config: &config,
            config_files: &means.loaded.files,
            importing: false,
            phase: "",
            percent: None,
            eta_seconds: None,
            eta_range_seconds: None,
            slow: "",
            cause: None,
            stuck: "",
            engine: None,
            ranks: &[],
            engine_version: None,
            last_exit: None,
            snapshots: &[],
            weights: None,
            read_ahead: None,
            half: &HalfView::default(),
            listen: &listen,
            warnings: &warnings,
            uptime: Duration::ZERO,
            gpus: &[],
            in_the_way: "",
            bundle: None,
            suspicion: None,
            suspicions: 0,
            remarks: &[],
        };
        let (status, status_reader) = watch::channel(facts.status());
        let (engine_view, engine_reader) = watch::channel(facts.view());
        let (settings, settings_reader) = watch::channel(ProxySettings::from(&config));
        let room = Room::new(Gpus::of(Source::from_env(|name| own_env.get(OsStr::new(name)).cloned())));
        let half = Half::keep(
            spawner.clone(),
            listeners,
            Orders { settings: settings_reader.clone(), engine: engine_reader.clone() },
            tell::proxy_env(&own_env, &config),
        );
        let outlook = Outlook {
            status: status_reader,
            engine: engine_reader,
            settings: settings_reader,
            half: half.clone(),
            orders: Orderly(reports.clone()),
        };
        let driver = Self {
            oversight,
            born: Instant::now(),
            awake: Instant::now(),
            means,
            spawner,
            listen,
            guard,
            signals,
            reload,
            half_view: half.view(),
            half,
            settings,
            engine_view,
            status,
            systemd: Systemd::new(),
            headline: String::new(),
            reports,
            inbox,
            said,
            hearing,
            steps,
            downloading,
            phases,
            phasing,
            current: Current::default(),
            warming: Beside::default(),
            reading: None,
            read_ahead: None,
            ahead,
            hearing_ahead,
            acquiring: None,
            stuck: Arc::new(Mutex::new(String::new())),
            acquired: None,
            preparing: None,
            prepared: None,
            engine: None,
            loading: Loading::default(),
            weights: None,
            cause: None,
            unexamined: None,
            last_exit: None,
            ranks: Vec::new(),
            warnings,
            room,
            uses: None,
            node: NodeFacts::default(),
            bundle: None,
            hurry: CancellationToken::new(),
            vigil: vigil::Vigil::default(),
            suspicions: 0,
            expected: Expected::default(),
            exit: None,
        };
        (driver, outlook)
    }

    fn config(&self) -> &Config {
        &self.means.loaded.config
    }

    fn now(&self) -> Millis {
        self.born.elapsed().as_millis() as Millis
    }

    /// Runs until the machine is stopped; the exit code is its last word.
    pub async fn run(mut self) -> u8 {
        self.look_at_gpus();
        self.act(Action::Fetch).await;
        self.publish();
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            if let Some(code) = self.exit {
                self.farewell().await;
                return code;
            }
            let due = self.oversight.machine.deadline().map(|at| self.born + Duration::from_millis(at));
            let turn = tokio::select! {
                biased;
                wish = self.signals.next() => Turn::Wish(wish),
                Some(report) = self.inbox.recv() => Turn::Report(report),
                Some(said) = self.hearing.recv() => Turn::Said(said),
                Some(step) = self.downloading.recv() => Turn::Step(step),
                Some(phase) = self.phasing.recv() => Turn::Phase(phase),
                Some(ahead) = self.hearing_ahead.recv() => Turn::Ahead(ahead),
                Ok(()) = self.half_view.changed() => Turn::Traffic,
                () = sleep_until(due) => Turn::Due,
                _ = beat.tick() => Turn::Beat,
            };
            self.woke().await;
            match turn {
                Turn::Wish(wish) => self.wished(wish).await,
                Turn::Report(report) => self.reported(report).await,
                Turn::Said(said) => self.heard(said).await,
                Turn::Step(step) => self.downloaded(&step),
                Turn::Phase(phase) => self.loading.named(phase),
                Turn::Ahead(ahead) => self.read_ahead_is(ahead),
                Turn::Traffic => self.traffic_changed().await,
                Turn::Due => self.on(Event::Tick).await,
                Turn::Beat => self.beat().await,
            }
            self.publish();
            self.awake = Instant::now();
        }
    }

    fn state(&self) -> &State {
        self.oversight.state()
    }

    async fn on(&mut self, event: Event) {
        self.take(News::Event(event)).await;
    }

    /// What follows from a piece of news; the answer is whether the machine was told of it.
    async fn take(&mut self, news: News) -> Option<Event> {
        let before = self.state().clone();
        let decided = self.oversight.take(news, self.now());
        self.carry_out(decided, &before).await
    }

    async fn carry_out(&mut self, Decided { event, orders }: Decided, before: &State) -> Option<Event> {
        // Nobody may read of an end without a reason: not found in time, it is told as far as it was seen.
        if matches!(before, State::Failing { .. })
            && !matches!(self.state(), State::Failing { .. })
            && let (Some(Event::Tick), Some(cause)) = (&event, self.unexamined.take())
        {
            self.blame(cause);
        }
        for order in orders {
            match order {
                Wanted::Think(opinion) => self.thinks(opinion),
                Wanted::Act(action) => self.act(action).await,
                Wanted::Ask(Question::Probe) => self.probe(),
                Wanted::Ask(Question::Look) => self.look(),
                Wanted::Ask(Question::Figures) => self.read_figures(),
            }
        }
        if std::mem::discriminant(before) != std::mem::discriminant(self.state()) {
            self.entered(before);
        }
        event
    }

    /// What belongs to a state from its first moment.
    fn entered(&mut self, before: &State) {
        if !matches!(self.state(), State::Launching | State::Loading { .. }) {
            self.stop_reading_ahead();
        }
        match self.state() {
            State::Fetching | State::Preparing => {
                self.loading = Loading::default();
                self.vigil = vigil::Vigil::of(self.expected.clone());
            }
            State::Launching => self.weights = None,
            State::Ready => {
                (self.cause, self.vigil.suspicion) = (None, None);
                // Ready again after it was busy: nothing begins.
                if matches!(before, State::Loading { .. }) {
                    self.begin_watch();
                }
                self.loading.ready();
            }
            _ => {}
        }
    }

    /// The engine is gone; the proxy and the guard are to be gone before we are, too.
    async fn farewell(&mut self) {
        self.half.close();
        let guard = self.guard.take().map(Guarded::bye);
        let mut view = self.half_view.clone();
        let gone = async {
            while view.changed().await.is_ok() {}
            if let Some(guard) = guard {
                let _ = guard.await;
            }
        };
        tokio::pin!(gone);
        let late = tokio::time::sleep(FAREWELL);
        tokio::pin!(late);
        loop {
            tokio::select! {
                () = &mut gone => return,
                // The kernel ends the proxy with us, the pipe's end the guard.
                () = &mut late => return,
                wish = self.signals.next() => {
                    if wish == Wish::Reap {
                        self.spawner.reap();
                    }
                }
            }
        }
    }
}

/// Never, where nothing is due.
async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
