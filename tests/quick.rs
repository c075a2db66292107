//! The quick integration tests: no root, no Python, no network. One module a group of
//! `docs/faults.md`; each fault is a test named by its id.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, clippy::print_stdout)]

mod harness;

mod architecture;
mod battery;
mod config_faults;
mod connection_faults;
mod direct_streams;
mod engine_away;
mod engine_faults;
mod health_faults;
mod http2_faults;
mod http2_rules;
mod http2_traffic;
mod http_faults;
mod keys_faults;
mod limits_faults;
mod main_job;
mod node_faults;
mod opened_routes;
mod operator_routes;
mod probe_and_status;
mod proxy_process;
mod repositories;
mod restarts;
mod signal_faults;
mod simulated_engine;
mod sizing;
mod soak;
mod stream_faults;
mod tls_faults;
mod websocket_faults;
mod weights_care;
mod weights_faults;
mod weights_ranges;
mod weights_start;
