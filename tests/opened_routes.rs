//! What `limits.routes` and `auth.routes` open and close, and the copies that a router in front needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use sglangd::link::routes::Rule;
use sglangd::link::{EngineState, ProxySettings};

use crate::harness::client::{Client, get, head, post, post_with};
use crate::harness::daemon::Setup;
use crate::harness::engine::{Engine, json};
use crate::harness::front::{Front, keys_file, settings, view};

fn rules(texts: &[&str]) -> Vec<Rule> {
    texts.iter().map(|text| Rule::parse(text).unwrap()).collect()
}

fn opening(engine: &Engine, routes: &[&str]) -> Front {
    Front::tuned(engine, |settings| settings.routes = rules(routes))
}

/// As the real engine tells it, keys and all.
const INFO: &str = r#"{"model_path":"/models/m","served_model_name":"m","dp_size":1,"api_key":"sk-client","admin_api_key":"sk-admin","ssl_keyfile_password":"pw","max_total_num_tokens":65536,"launch_command":["--api-key","sk-client"],"internal_states":[{"api_key":"sk-client","token_usage":0.5}]}"#;

/// Answers what is asked of it by its path, until it hangs; how often it was asked.
fn informed() -> (Engine, Arc<AtomicBool>, Arc<AtomicUsize>) {
    let (hangs, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (hang, count) = (Arc::clone(&hangs), Arc::clone(&asked));
    let engine = Engine::start(move |connection| {
        while let Some(head) = connection.request() {
            count.fetch_add(1, SeqCst);
            if hang.load(SeqCst) {
                connection.until_closed();
                return;
            }
            let answer = match head.split(' ').nth(1).unwrap() {
                "/server_info" => json("200 OK", INFO),
                "/model_info" => json("200 OK", r#"{"model_path":"/models/m","is_generation":true}"#),
                "/v1/loads?include=core" => json("200 OK", r#"{"loads":[{"dp_rank":0,"num_running_reqs":3}]}"#),
                _ => json("404 Not Found", "{}"),
            };
            connection.send(answer);
        }
    });
    (engine, hangs, asked)
}

#[test]
fn copies_are_closed_until_they_are_opened_by_name() {
    let (engine, _, asked) = informed();
    let mut front = Front::of(&engine);
    for path in ["/server_info", "/get_server_info", "/model_info", "/v1/loads"] {
        let answer = Client::ask(front.addr, get(path));
        assert_eq!((answer.status, answer.code().as_str()), (403, "closed_route"), "{path}");
    }
    assert_eq!(asked.load(SeqCst), 0);
    // A reload opens one, and no other.
    front.proxy.settings(ProxySettings { routes: rules(&["/model_info"]), ..settings() }).unwrap();
    assert_eq!(Client::ask(front.addr, get("/model_info")).json()["is_generation"], true);
    assert_eq!(Client::ask(front.addr, get("/server_info")).status, 403);
    assert_eq!(front.metric("sglangd_requests_total{route=\"/model_info\",status=\"2xx\"}"), Some(1.0));
}

#[test]
fn f08_an_opened_server_info_shows_no_key() {
    let (engine, _, _) = informed();
    let front = opening(&engine, &["/server_info", "/get_server_info"]);
    for path in ["/server_info", "/get_server_info"] {
        let answer = Client::ask(front.addr, get(path));
        assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
        for secret in ["sk-client", "sk-admin", "pw\"", "--api-key"] {
            assert!(!answer.text().contains(secret), "{secret} is in {}", answer.text());
        }
        let info = answer.json();
        // What a router registers a worker by, in the engine's shapes.
        assert_eq!((&info["model_path"], &info["served_model_name"]), (&"/models/m".into(), &"m".into()));
        assert_eq!((&info["dp_size"], &info["max_total_num_tokens"]), (&1.into(), &65536.into()));
        assert_eq!(info["internal_states"][0]["token_usage"], 0.5);
    }
    let answer = Client::connect(front.addr).send(head("HEAD /server_info HTTP/1.1", "Host: a\r\n")).answer_to("HEAD");
    assert_eq!(answer.status, 200);
    assert_eq!(Client::ask(front.addr, post("/server_info", "{}")).status, 405);
}

#[test]
fn copies_are_asked_for_once_and_outlive_a_scheduler_that_hangs() {
    let (engine, hangs, asked) = informed();
    let front = opening(&engine, &["/server_info", "/v1/loads"]);
    for _ in 0..5 {
        assert_eq!(Client::ask(front.addr, get("/server_info")).status, 200);
    }
    assert_eq!(asked.load(SeqCst), 1, "the engine was asked for each");
    assert_eq!(Client::ask(front.addr, get("/v1/loads?include=core")).json()["loads"][0]["num_running_reqs"], 3);
    hangs.store(true, SeqCst);
    // Suspected: what is known is told at once, and the engine is left alone.
    let mut suspected = view(EngineState::Busy, Some(engine.addr));
    suspected.suspected = true;
    front.proxy.engine(suspected);
    let before = asked.load(SeqCst);
    assert_eq!(Client::ask(front.addr, get("/server_info")).json()["dp_size"], 1);
    assert_eq!(Client::ask(front.addr, get("/v1/loads?include=core")).status, 200);
    assert_eq!(asked.load(SeqCst), before);
    // Old, and the engine does not answer: the old one is better than none. Everybody waits once.
    front.proxy.engine(view(EngineState::Ready, Some(engine.addr)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let addr = front.addr;
            std::thread::spawn(move || Client::ask(addr, get("/v1/loads?include=core")).status)
        })
        .collect();
    assert!(clients.into_iter().all(|client| client.join().unwrap() == 200));
    assert!(asked.load(SeqCst) <= before + 2, "each of them asked a hanging engine");
    // An engine that is gone has nothing to say, and what the dead one said is forgotten.
    front.proxy.engine(view(EngineState::Reaping, None));
    let answer = Client::ask(front.addr, get("/server_info"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "engine_reaping"));
    assert!(answer.header("retry-after").is_some());
    let (other, _, fresh) = informed();
    front.proxy.engine(view(EngineState::Ready, Some(other.addr)));
    assert_eq!(Client::ask(front.addr, get("/server_info")).status, 200);
    assert_eq!(fresh.load(SeqCst), 1, "a dead engine's copy was shown");
}

#[test]
fn an_engine_that_never_told_is_a_503_and_odd_parameters_are_a_400() {
    let engine = Engine::answering(json("200 OK", "no json"));
    let front = opening(&engine, &["/server_info", "/v1/loads"]);
    let answer = Client::ask(front.addr, get("/server_info"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "engine_silent"));
    let connections = engine.connections();
    for query in ["include=core&include=all", "x=1", "format=html", "include=core%2Call"] {
        assert_eq!(Client::ask(front.addr, get(&format!("/v1/loads?{query}"))).status, 400, "{query}");
    }
    assert_eq!(engine.connections(), connections);
}

#[test]
fn routes_of_tomorrow_are_opened_by_name_and_usual_ones_are_closed() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = opening(&engine, &["/v2/think", "-/generate", "-/v1/models/{model}"]);
    assert_eq!(Client::ask(front.addr, post("/v2/think?deep=1", "{}")).status, 200);
    assert!(engine.text(0).starts_with("POST /v2/think?deep=1 HTTP/1.1\r\n"));
    for (path, status) in
        [("/generate", 403), ("/v1/models/m", 403), ("/v1/models", 200), ("/v2/thinks", 404), ("/v2/think/", 404)]
    {
        let request = if path == "/generate" { post(path, "{}") } else { get(path) };
        assert_eq!(Client::ask(front.addr, request).status, status, "{path}");
    }
    assert_eq!(Client::ask(front.addr, get("/v2/../v2/think")).status, 400);
}

#[test]
fn auth_routes_say_where_a_key_is_asked_for() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let keys = keys_file(&[("ci", "secret", "")]);
    let front = Front::tuned(&engine, |settings| {
        settings.keys_file = Some(keys.path().to_owned());
        settings.routes = rules(&["/model_info", "/v2/new"]);
        settings.auth_routes = rules(&["-/v1/models", "-/model_info", "/ready"]);
    });
    let keyed = |path: &str| head(&format!("GET {path} HTTP/1.1"), "Host: a\r\nX-Api-Key: secret\r\n");
    for (path, without) in [
        ("/v1/models", 200),
        ("/model_info", 200),
        ("/health", 200),
        ("/ready", 401),
        ("/v1/models/m", 401),
        ("/v2/new", 401),
    ] {
        assert_eq!(Client::ask(front.addr, get(path)).status, without, "{path} without a key");
        assert_eq!(Client::ask(front.addr, keyed(path)).status, 200, "{path} with a key");
    }
    // Where none is asked for, a wrong one is no matter, and none reaches the engine.
    let wrong =
        post_with("/v1/models", "", "").replace("POST", "GET").replace("\r\n\r\n", "\r\nX-Api-Key: wrong\r\n\r\n");
    assert_eq!(Client::ask(front.addr, wrong).status, 200);
    let arrived = (0..engine.connections()).map(|n| engine.text(n)).collect::<String>();
    assert!(!arrived.contains("wrong") && !arrived.contains("secret"), "{arrived}");
}

#[test]
fn a_list_of_routes_that_cannot_be_is_refused_with_the_way_out() {
    for (key, value, said) in [
        ("limits.routes", "[/flush_cache]", "operator's"),
        ("limits.routes", "[/metrics]", "operator's"),
        ("limits.routes", "[-/health]", "always"),
        ("limits.routes", "[-/generat]", "did you mean /generate?"),
        ("limits.routes", "/server_info", "not a list"),
        ("limits.routes", "[server_info]", "a path like"),
        ("auth.routes", "[/v1/models, -/v1/models]", "twice"),
        ("limits.connections", "3", "16"),
    ] {
        let output = Setup::simulated().set(key, value).full_command("plan").output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{key}={value}: {error}");
        assert!(error.contains(said), "{key}={value}: {error}");
    }
    let routes = "[/server_info, -/generate, /v2/new]";
    let output = Setup::simulated().set("limits.routes", routes).full_command("plan").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
