//! The same bytes to sglangd, nginx and haproxy, before the same engine: who lets what through.
//!
//! Not part of any other run: `tests/long battery` installs the other two and prints the table that is in
//! `docs/security.md`. What exactly sglangd answers is the business of the tests by groups; here only
//! what must hold of any proxy is asked.

mod cases;
mod servers;

use std::collections::BTreeMap;

use cases::cases;
use servers::Server;

const SERVERS: [Server; 3] = [Server::Sglangd, Server::Nginx, Server::Haproxy];

#[test]
#[ignore = "needs nginx and haproxy: tests/long battery"]
fn the_battery_against_all_three() {
    let cases = cases();
    let mut failed: BTreeMap<(&str, usize), Vec<String>> = BTreeMap::new();
    for case in &cases {
        for (n, server) in SERVERS.iter().enumerate() {
            if let Err(what) = (case.run)(*server) {
                println!("{} {}: {} {what}", case.id, case.what, server.name());
                failed.entry((case.id, n)).or_default().push(case.what.clone());
            }
        }
    }
    let mut ids: Vec<&str> = cases.iter().map(|case| case.id).collect();
    ids.dedup();
    let of = |id: &str| cases.iter().filter(|case| case.id == id).count();
    println!("\n| row | cases | {} |", SERVERS.map(Server::version).join(" | "));
    println!("| --- | --- | --- | --- | --- |");
    for id in &ids {
        let passed = |n: usize| of(id) - failed.get(&(*id, n)).map_or(0, Vec::len);
        println!("| {id} | {} | {} | {} | {} |", of(id), passed(0), passed(1), passed(2));
    }
    let missed =
        |n: usize| failed.iter().filter(|((_, server), _)| *server == n).map(|(_, what)| what.len()).sum::<usize>();
    let all = cases.len();
    println!("| all | {all} | {} | {} | {} |", all - missed(0), all - missed(1), all - missed(2));
    assert_eq!(missed(0), 0, "sglangd misses some");
}
