//! What the configuration makes of the routes: which are served, and which of them ask for a key.

use std::collections::HashMap;

use super::{COPIED, COUNT, Decision, OPENED, Own, Route, index, usual};
use crate::link::routes::{OWN, Rule, Way, is_operators};

/// Whether a key must be shown, where keys are known at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    Key,
    Nobody,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Served {
    Yes,
    No,
}

/// The routes as they are opened, closed and guarded at present.
#[derive(Debug, Clone)]
pub struct Table {
    /// By [`index`].
    rows: [(Served, Asks); COUNT],
    own: [Asks; OWN.len()],
    /// Opened by their whole path, known to nobody here.
    opened: HashMap<String, Asks>,
}

impl Default for Table {
    fn default() -> Self {
        let mut rows = [(Served::Yes, Asks::Key); COUNT];
        for copy in COPIED.iter().filter_map(index) {
            rows[copy].0 = Served::No;
        }
        Self { rows, own: [Asks::Nobody; OWN.len()], opened: HashMap::new() }
    }
}

impl Table {
    /// `routes` opens and closes, `guarded` says where a key is asked for.
    pub fn new(routes: &[Rule], guarded: &[Rule]) -> Self {
        let mut table = Self::default();
        for Rule { path, way } in routes {
            let served = if *way == Way::In { Served::Yes } else { Served::No };
            if let Some(row) = row(path) {
                table.rows[row].0 = served;
            } else if served == Served::Yes && !is_operators(path) && !OWN.contains(&path.as_str()) {
                table.opened.insert(path.clone(), Asks::Key);
            }
        }
        for Rule { path, way } in guarded {
            let asks = if *way == Way::In { Asks::Key } else { Asks::Nobody };
            if let Some(own) = OWN.iter().position(|own| own == path) {
                table.own[own] = asks;
            } else if let Some(row) = row(path) {
                table.rows[row].1 = asks;
            } else if let Some(opened) = table.opened.get_mut(path) {
                *opened = asks;
            }
        }
        table
    }

    /// Where a request for `path` (no query) goes, and whether it has to show a key.
    pub fn decide(&self, path: &str) -> (Decision, Asks) {
        let decision = usual(path);
        match decision {
            Decision::Own(own) => (decision, self.own[own as usize]),
            Decision::Engine(route) | Decision::Copy(route) => match self.row_of(route) {
                (Served::Yes, asks) => (decision, asks),
                (Served::No, asks) => (Decision::Closed, asks),
            },
            Decision::Closed | Decision::Unknown if !self.opened.is_empty() => match self.opened.get(path) {
                Some(asks) => (Decision::Engine(&OPENED), *asks),
                None => (decision, Asks::Nobody),
            },
            Decision::Closed | Decision::Unknown | Decision::Forbidden | Decision::Ambiguous => {
                (decision, Asks::Nobody)
            }
        }
    }

    fn row_of(&self, route: &'static Route) -> (Served, Asks) {
        index(route).map_or((Served::No, Asks::Key), |row| self.rows[row])
    }
}

/// The row of a route by its name in the configuration.
fn row(path: &str) -> Option<usize> {
    super::all().position(|route| route.name == path)
}

const _: () = assert!(Own::Live as usize == 0 && Own::Health as usize == 1 && Own::Ready as usize == 2);

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| Rule::parse(text).expect("a rule")).collect()
    }

    #[test]
    fn routes_are_opened_and_closed_by_name() {
        let table = Table::new(&rules(&["/server_info", "-/generate", "/v2/new", "/open_session"]), &[]);
        assert!(matches!(table.decide("/server_info"), (Decision::Copy(_), Asks::Key)));
        assert_eq!(table.decide("/generate").0, Decision::Closed);
        for opened in ["/v2/new", "/open_session"] {
            assert_eq!(table.decide(opened), (Decision::Engine(&OPENED), Asks::Key));
        }
        for other in ["/v2/new/", "/v2"] {
            assert_eq!(table.decide(other).0, Decision::Unknown, "{other}");
        }
        assert_eq!(table.decide("/v1/loads").0, Decision::Closed);
        assert!(matches!(table.decide("/encode").0, Decision::Engine(_)));
    }

    #[test]
    fn no_rule_opens_an_operators_route_or_takes_a_probe_away() {
        let table = Table::new(&rules(&["/flush_cache", "/update_weights_from_disk", "/metrics", "-/health"]), &[]);
        for path in ["/flush_cache", "/update_weights_from_disk", "/metrics"] {
            assert_eq!(table.decide(path).0, Decision::Forbidden, "{path}");
        }
        assert_eq!(table.decide("/health").0, Decision::Own(Own::Health));
    }

    #[test]
    fn keys_are_asked_for_where_it_is_said() {
        let opened = rules(&["/v1/loads", "/v2/new"]);
        let table = Table::new(&opened, &rules(&["-/v1/models", "-/v1/loads", "-/v2/new", "/ready"]));
        let asks = |path| table.decide(path).1;
        assert_eq!([asks("/v1/models"), asks("/v1/loads"), asks("/v2/new")], [Asks::Nobody; 3]);
        assert_eq!([asks("/ready"), asks("/v1/models/a"), asks("/generate")], [Asks::Key; 3]);
        assert_eq!(asks("/health"), Asks::Nobody);
    }
}
