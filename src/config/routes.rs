//! `limits.routes` and `auth.routes`: lists of paths, each put into a set of routes or taken out of it.

use super::build::Builder;
use super::document::Node;
use super::error::{Mistake, nearest};
use super::keys;
use super::source::Place;
use crate::link::routes::{CLOSED, COPIES, OWN, Rule, SERVED, Way, is_operators};

impl Builder<'_> {
    /// What clients may ask for, beside the usual routes or not at all.
    pub(super) fn served_routes(&mut self) -> Vec<Rule> {
        let rules = self.rules("limits.routes");
        for (rule, place) in &rules {
            let path = rule.path.as_str();
            if rule.way == Way::In && is_operators(path) {
                self.mistakes.push(
                    Mistake::new(
                        format!("`limits.routes` cannot open `{path}`: it is the operator's, never a client's"),
                        "ask the admin listener (listen.admin) with an operator's key: `sglangd keys add NAME --operator`",
                    )
                    .at(place, "an operator's route"),
                );
            } else if OWN.contains(&path) {
                self.mistakes.push(
                    Mistake::new(
                        format!("`limits.routes` cannot name `{path}`: sglangd always answers it itself"),
                        "remove it; a balancer needs it",
                    )
                    .at(place, "always served"),
                );
            } else if ![&SERVED[..], &COPIES, &CLOSED].concat().contains(&path) {
                let near = nearest(path, SERVED.iter().chain(&COPIES).chain(&CLOSED).copied());
                let hint = near.map_or(String::new(), |near| format!(": did you mean {near}?"));
                match rule.way {
                    Way::Out => self.mistakes.push(
                        Mistake::new(
                            format!("`limits.routes` closes `{path}`, which is not open{hint}"),
                            "remove it, or name a route as docs/security.md lists them",
                        )
                        .at(place, "not open"),
                    ),
                    Way::In if path.contains(['{', '}']) => self.mistakes.push(
                        Mistake::new(
                            format!("`limits.routes` opens `{path}`, which holds a brace{hint}"),
                            "name whole paths",
                        )
                        .at(place, "no path"),
                    ),
                    Way::In if near.is_some() => self
                        .warnings
                        .push(format!("limits.routes opens {path}, which is none of SGLang's known routes{hint}")),
                    Way::In => {}
                }
            }
        }
        rules.into_iter().map(|(rule, _)| rule).collect()
    }

    /// Where a key is asked for, beside the usual routes or not at all.
    pub(super) fn guarded_routes(&mut self) -> Vec<Rule> {
        let rules = self.rules("auth.routes");
        if let Some((rule, _)) = rules.first()
            && self.last("auth.keys_file").is_none_or(|said| said.node.is_null())
        {
            self.warnings
                .push(format!("auth.routes names {} but there is no auth.keys_file: no key is asked for", rule.path));
        }
        rules.into_iter().map(|(rule, _)| rule).collect()
    }

    fn rules(&mut self, path: &'static str) -> Vec<(Rule, Place)> {
        let Some(said) = self.last(path).filter(|said| !said.node.is_null()) else { return Vec::new() };
        let key = keys::find(path).expect("every path in this file is in KEYS");
        let Node::List(items, _) = &said.node else {
            self.mistakes.push(
                Mistake::new(format!("`{path}` is {}, not a list", said.node.describe()), format!("write {}", key.is))
                    .at(said.node.place(), "not a list"),
            );
            return Vec::new();
        };
        let mut rules: Vec<(Rule, Place)> = Vec::new();
        for item in items {
            let parsed = match item {
                Node::Scalar { text, .. } => Rule::parse(text),
                _ => Err("a path".to_owned()),
            };
            match parsed {
                Ok(rule) if rules.iter().any(|(known, _)| known.path == rule.path) => self.mistakes.push(
                    Mistake::new(format!("`{path}` names `{}` twice", rule.path), "keep one of the two")
                        .at(item.place(), "again"),
                ),
                Ok(rule) => rules.push((rule, item.place().clone())),
                Err(expected) => self.mistakes.push(
                    Mistake::new(
                        format!("`{path}` has {} in its list, which is not {expected}", item.describe()),
                        format!("write {}", key.is),
                    )
                    .at(item.place(), "not a route"),
                ),
            }
        }
        rules
    }
}
