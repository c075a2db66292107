//! What was said becomes a checked [`Config`]: types, bounds, and values that exclude each other.

use std::collections::BTreeMap;
use std::num::{NonZeroU16, NonZeroU64};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::document::{Node, Style};
use super::error::Mistake;
use super::keys::{self, KEYS, Shape};
use super::layers::{Layers, Said};
use super::source::{self, Place, SourceKind};
use super::values::{endpoint, model_name, repo, whole};
use super::{
    Auth, Config, Download, Engine, Flags, Health, IoPriority, Limits, LogFormat, Model, ModelSource, Observe,
    OnGiveUp, PageCache, Pickles, Prefetch, Restart, Shutdown, SizedBy, Start, UnknownFlags, Weights, units,
};

/// The least grace: streams are cut 8 s and everything is killed 2 s before its end.
const MIN_GRACE: Duration = Duration::from_secs(10);
/// `/health` always takes 1 s: with a time-out at or below that every probe fails.
const MIN_PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// What relative paths and `~` are relative to.
#[derive(Debug, Clone)]
pub struct Bases {
    pub cwd: PathBuf,
    pub home: Option<PathBuf>,
    /// `CUDA_VISIBLE_DEVICES` of sglangd itself.
    pub visible_devices: Option<String>,
}

pub struct Builder<'a> {
    pub(super) layers: &'a Layers,
    pub(super) bases: &'a Bases,
    pub mistakes: Vec<Mistake>,
    pub warnings: Vec<String>,
}

impl<'a> Builder<'a> {
    pub fn new(layers: &'a Layers, bases: &'a Bases) -> Self {
        Self { layers, bases, mistakes: Vec::new(), warnings: Vec::new() }
    }

    pub fn config(&mut self) -> Config {
        let model = self.model();
        let config = Config {
            model,
            weights: Weights {
                download: self.choice("weights.download", &[("auto", Download::Auto), ("never", Download::Never)]),
                cache: self.path("weights.cache"),
                endpoint: self.optional("weights.endpoint", endpoint),
                connections: self.value("weights.connections", |text| {
                    let said = whole(text, 1, 256)?;
                    NonZeroU16::try_from(said as u16).map_err(|error| error.to_string())
                }),
                max_rate: self.optional("weights.max_rate", |text| {
                    NonZeroU64::new(units::size(text)?).ok_or_else(|| "at least 1 byte a second".to_owned())
                }),
                xet_memory: self.optional("weights.xet_memory", units::size),
                page_cache: self.choice(
                    "weights.page_cache",
                    &[("auto", PageCache::Auto), ("keep", PageCache::Keep), ("bypass", PageCache::Bypass)],
                ),
                nice: self.value("weights.nice", |text| whole(text, 0, 19).map(|n| n as i32)),
                ioprio: self.choice(
                    "weights.ioprio",
                    &[("none", None), ("best-effort", Some(IoPriority::BestEffort)), ("idle", Some(IoPriority::Idle))],
                ),
                include: self.patterns("weights.include"),
                exclude: self.patterns("weights.exclude"),
                pickles: self.choice("weights.pickles", &[("refuse", Pickles::Refuse), ("allow", Pickles::Allow)]),
                prefetch: self.choice(
                    "weights.prefetch",
                    &[("auto", Prefetch::Auto), ("always", Prefetch::Always), ("never", Prefetch::Never)],
                ),
            },
            engine: Engine {
                command: self.words("engine.command"),
                tp: self.value("engine.tp", |text| whole(text, 1, 1024).map(|n| n as u32)),
                flags: Flags(self.layers.final_flags()),
                unknown_flags: self
                    .choice("engine.unknown_flags", &[("refuse", UnknownFlags::Refuse), ("pass", UnknownFlags::Pass)]),
                env: self.environment(),
            },
            listen: self.listen(),
            limits: Limits {
                max: self.count("limits.max", 1, 100_000),
                target: self.count("limits.target", 1, 100_000),
                queue: self.count("limits.queue", 0, 1_000_000),
                sizing: self.choice("limits.sizing", &[("engine", SizedBy::Engine), ("fixed", SizedBy::Fixed)]),
                queue_timeout: self.at_least("limits.queue_timeout", Duration::from_millis(1)),
                hold: self.at_least("limits.hold", Duration::ZERO),
                max_body: self.value("limits.max_body", |text| {
                    units::size(text).and_then(|n| if n >= 1024 { Ok(n) } else { Err("at least 1KiB".to_owned()) })
                }),
                workers: self.value("limits.workers", |text| match text {
                    "auto" => Ok(None),
                    _ => whole(text, 1, 1024).map(|n| Some(n as usize)),
                }),
                connections: self.value("limits.connections", |text| match text {
                    "auto" => Ok(None),
                    _ => whole(text, 16, 1_000_000).map(|n| Some(n as usize)),
                }),
                connections_per_peer: self.value("limits.connections_per_peer", |text| match text {
                    "off" => Ok(None),
                    _ => whole(text, 1, 1_000_000).map(|n| Some(n as usize)),
                }),
                routes: self.served_routes(),
            },
            auth: Auth { keys_file: self.path("auth.keys_file"), routes: self.guarded_routes() },
            start: Start {
                stall: self.at_least("start.stall", Duration::from_secs(1)),
                limit: self.at_least("start.limit", Duration::from_secs(1)),
            },
            health: Health {
                probe_interval: self.at_least("health.probe_interval", Duration::from_secs(1)),
                probe_timeout: self.at_least("health.probe_timeout", MIN_PROBE_TIMEOUT),
                hang_after: self.at_least("health.hang_after", Duration::from_secs(1)),
            },
            restart: Restart {
                max: self.value("restart.max", |text| whole(text, 1, 1000).map(|n| n as u32)),
                window: self.at_least("restart.window", Duration::from_secs(1)),
                backoff: self.at_least("restart.backoff", Duration::ZERO),
                backoff_max: self.at_least("restart.backoff_max", Duration::ZERO),
                on_give_up: self.choice("restart.on_give_up", &[("serve", OnGiveUp::Serve), ("exit", OnGiveUp::Exit)]),
            },
            shutdown: Shutdown { grace: self.at_least("shutdown.grace", MIN_GRACE) },
            observe: Observe {
                format: self.choice(
                    "observe.log",
                    &[("text", LogFormat::Text), ("json", LogFormat::Json), ("journald", LogFormat::Journald)],
                ),
                level: self.value("observe.level", |text| {
                    tracing_subscriber::EnvFilter::try_new(text)
                        .map(|_| text.to_owned())
                        .map_err(|_| "a filter: info, debug, or sglangd=debug,warn".to_owned())
                }),
            },
        };
        self.cross_check(&config);
        config
    }

    // ------------------------------------------------------------------ single values

    pub(super) fn last(&self, path: &str) -> Option<&'a Said> {
        self.layers.said.get(path).and_then(|said| said.last())
    }

    pub(super) fn value_place(&self, path: &str) -> Option<Place> {
        self.last(path).map(|said| said.node.place().clone())
    }

    /// The scalar's text where one was said rightly.
    fn said_text(&mut self, path: &str) -> Option<(&'a str, &'a Place)> {
        let said = self.last(path)?;
        let key = keys::find(path).expect("every path in this file is in KEYS");
        match &said.node {
            node if node.is_null() => {
                if let Some(default) = key.default {
                    self.mistakes.push(
                        Mistake::new(
                            format!("`{path}` has no value"),
                            format!("write {}, or remove the line (the default is {default})", key.is),
                        )
                        .at(&said.key_place, "no value"),
                    );
                }
                None
            }
            Node::Scalar { text, place, .. } => Some((text, place)),
            node => {
                self.mistakes.push(
                    Mistake::new(
                        format!("`{path}` is {}, not one value", node.describe()),
                        format!("write {}", key.is),
                    )
                    .at(node.place(), "not one value"),
                );
                None
            }
        }
    }

    pub(super) fn value<T>(&mut self, path: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> T {
        if let Some((text, place)) = self.said_text(path) {
            match parse(text) {
                Ok(value) => return value,
                Err(expected) => self.wrong(path, text, place, &expected),
            }
        }
        let default = keys::find(path).and_then(|key| key.default).unwrap_or_default();
        match parse(default) {
            Ok(value) => value,
            Err(expected) => unreachable!("the default of {path} is not {expected}: a test builds them all"),
        }
    }

    fn optional<T>(&mut self, path: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let (text, place) = self.said_text(path)?;
        match parse(text) {
            Ok(value) => Some(value),
            Err(expected) => {
                self.wrong(path, text, place, &expected);
                None
            }
        }
    }

    fn wrong(&mut self, path: &str, text: &str, place: &Place, expected: &str) {
        let shown = if text.is_empty() { "empty".to_owned() } else { format!("`{text}`") };
        let key = keys::find(path).expect("every path in this file is in KEYS");
        let default = key.default.map(|default| format!(" (the default is {default})")).unwrap_or_default();
        self.mistakes.push(
            Mistake::new(format!("`{path}` is {shown}, which is not {expected}"), format!("write {}{default}", key.is))
                .at(place, format!("not {expected}")),
        );
    }

    pub(super) fn choice<T: Copy>(&mut self, path: &'static str, choices: &[(&str, T)]) -> T {
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
        self.value(path, |text| {
            choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| names.join(" or "))
        })
    }

    fn count(&mut self, path: &'static str, min: u64, max: u64) -> usize {
        self.value(path, |text| whole(text, min, max).map(|n| n as usize))
    }

    fn at_least(&mut self, path: &'static str, min: Duration) -> Duration {
        self.value(path, |text| {
            let value = units::duration(text)?;
            if value < min { Err(format!("at least {}", units::show_duration(min))) } else { Ok(value) }
        })
    }

    pub(super) fn path(&mut self, path: &'static str) -> Option<PathBuf> {
        let place = self.value_place(path)?;
        let base = self.base_of(&place);
        let home = self.bases.home.clone();
        self.optional(path, |text| {
            if text.is_empty() { Err("a path".to_owned()) } else { Ok(source::absolute(text, &base, home.as_deref())) }
        })
    }

    /// Relative paths in a file are relative to it; else to the working folder.
    fn base_of(&self, place: &Place) -> PathBuf {
        match place.source.kind {
            SourceKind::File => {
                let file = self.bases.cwd.join(&place.source.name);
                file.parent().unwrap_or(Path::new("/")).to_path_buf()
            }
            _ => self.bases.cwd.clone(),
        }
    }

    /// A program and its arguments.
    fn words(&mut self, path: &'static str) -> Vec<String> {
        let key = keys::find(path).expect("every path in this file is in KEYS");
        let default = || {
            let text = key.default.unwrap_or_default().trim_matches(['[', ']']);
            text.split(", ").map(ToOwned::to_owned).collect()
        };
        let Some(said) = self.last(path) else { return default() };
        let Some(words) = self.list(path, ": it is never given to a shell, which would split words") else {
            return default();
        };
        if words.first().is_none_or(String::is_empty) {
            self.mistakes.push(
                Mistake::new(format!("`{path}` names no program"), format!("write {}", key.is))
                    .at(said.node.place(), "empty"),
            );
            return default();
        }
        words
    }

    /// Patterns of file names; none where nothing was said.
    fn patterns(&mut self, path: &'static str) -> Vec<String> {
        let Some(said) = self.last(path) else { return Vec::new() };
        let patterns = self.list(path, "").unwrap_or_default();
        for pattern in &patterns {
            if let Err(error) = globset::Glob::new(pattern) {
                self.mistakes.push(
                    Mistake::new(
                        format!("`{path}` has {pattern:?}, which is no pattern: {}", error.kind()),
                        "write names with `*` and `?`, like 'original/*'",
                    )
                    .at(said.node.place(), "no pattern"),
                );
            }
        }
        patterns
    }

    /// The words of a list that was said; none: it is no list, which is noted.
    fn list(&mut self, path: &'static str, why: &str) -> Option<Vec<String>> {
        let key = keys::find(path).expect("every path in this file is in KEYS");
        let said = self.last(path)?;
        let Node::List(items, _) = &said.node else {
            self.mistakes.push(
                Mistake::new(
                    format!("`{path}` is {}, not a list", said.node.describe()),
                    format!("write {}{why}", key.is),
                )
                .at(said.node.place(), "not a list"),
            );
            return None;
        };
        let mut words = Vec::new();
        for item in items {
            match item {
                Node::Scalar { text, style, .. } if !text.is_empty() || *style == Style::Quoted => {
                    words.push(text.clone());
                }
                other => self.mistakes.push(
                    Mistake::new(format!("`{path}` has {} in its list", other.describe()), format!("write {}", key.is))
                        .at(other.place(), "not a word"),
                ),
            }
        }
        Some(words)
    }

    fn environment(&mut self) -> BTreeMap<String, String> {
        let mut env = BTreeMap::new();
        for (name, said) in &self.layers.env {
            let Some(said) = said.last() else { continue };
            if name.is_empty() || name.contains(['=', '\0']) || name.chars().any(char::is_whitespace) {
                self.mistakes.push(
                    Mistake::new(format!("`{name}` cannot name an environment variable"), "write NAME: value")
                        .at(&said.key_place, "no name"),
                );
                continue;
            }
            match &said.node {
                node if node.is_null() => {}
                Node::Scalar { text, .. } => {
                    env.insert(name.clone(), text.clone());
                }
                node => self.mistakes.push(
                    Mistake::new(format!("`engine.env.{name}` is {}, not one value", node.describe()), "quote it")
                        .at(node.place(), "not one value"),
                ),
            }
        }
        env
    }

    // ------------------------------------------------------------------ the model

    fn model(&mut self) -> Model {
        let (repo_said, path_said) = (self.last("model.repo"), self.last("model.path"));
        let said = |said: Option<&'a Said>| said.filter(|said| !said.node.is_null());
        let revision = self.value("model.revision", |text| {
            if text.is_empty() || text.contains(char::is_whitespace) {
                Err("a branch, tag or commit".to_owned())
            } else {
                Ok(text.to_owned())
            }
        });
        let source = match (said(repo_said), said(path_said)) {
            (Some(repo), Some(path)) if repo.layer == path.layer => {
                self.mistakes.push(
                    Mistake::new(
                        "`model.repo` and `model.path` exclude each other",
                        "keep one: a repository or a folder",
                    )
                    .at(&path.key_place, "this one")
                    .also(&repo.key_place, "or this one"),
                );
                None
            }
            (Some(repo), Some(path)) if repo.layer > path.layer => self.repo(revision),
            (Some(_), None) => self.repo(revision),
            (_, Some(_)) => self.path("model.path").map(ModelSource::Folder),
            (None, None) => {
                self.mistakes.push(Mistake::new(
                    "no model is named",
                    "write `model:` and below it `repo: ORGANISATION/NAME` or `path: FOLDER`",
                ));
                None
            }
        };
        // Only seen when a mistake was recorded: nothing is started then.
        let source = source.unwrap_or_else(|| ModelSource::Folder(PathBuf::new()));
        let default_name = match &source {
            ModelSource::Repo { repo, .. } => repo.clone(),
            ModelSource::Folder(path) => {
                path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
            }
        };
        let name = self.optional("model.name", model_name).unwrap_or_else(|| {
            if default_name.contains(':') {
                self.mistakes.push(Mistake::new(
                    format!("the model's name `{default_name}` holds `:`, which SGLang does not serve"),
                    "give it another: `model:`, `name: NAME`",
                ));
            }
            default_name
        });
        Model { source, name }
    }

    fn repo(&mut self, revision: String) -> Option<ModelSource> {
        self.optional("model.repo", repo).map(|repo| ModelSource::Repo { repo, revision })
    }
}

/// All keys with no default or that are merged name by name are absent from this list on purpose.
pub fn scalar_defaults() -> impl Iterator<Item = (&'static str, &'static str)> {
    KEYS.iter()
        .filter(|key| matches!(key.shape, Shape::Scalar | Shape::Words))
        .map(|key| (key.path, key.default.unwrap_or("not set")))
}
