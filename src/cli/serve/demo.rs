//! `serve --demo`: the main job with no GPU, no Python and no network. An embedded hub stands in for
//! the model hub, `sglangd simulate` for the engine; all files lie in a temporary folder. Nothing
//! else of `serve` knows that it is a demo.

use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc;

use tempfile::TempDir;

use super::ServeArgs;
use crate::simulate::hub::{Content, Hub, Options};

/// 64 MiB in some seconds: long enough to see the bar, short enough to wait for.
const RATE: u64 = 24 << 20;

/// Ends with the process; the folder is removed when this is dropped.
#[derive(Debug)]
pub struct Demo {
    _folder: TempDir,
}

/// Starts the hub and sets the endpoint, the engine's command and the folders.
pub fn begin(args: &mut ServeArgs) -> io::Result<Demo> {
    let folder = tempfile::Builder::new().prefix("sglangd-demo-").tempdir()?;
    let endpoint = hub()?;
    let exe = std::env::current_exe()?;
    let path = |name: &str| folder.path().join(name);
    args.daemon.folders.runtime_dir.get_or_insert_with(|| path("run"));
    args.daemon.folders.state_dir.get_or_insert_with(|| path("state"));
    if args.daemon.config.config.is_empty() {
        // The shipped configuration, wherever this machine may have another.
        std::fs::write(path("config.yaml"), crate::config::SHIPPED)?;
        args.daemon.config.config.push(path("config.yaml"));
    }
    let mut set = |key: &str, value: &str| args.daemon.config.set.insert(0, format!("{key}={value}"));
    set("weights.endpoint", &endpoint);
    set("weights.cache", &quoted(&path("hub")));
    set("engine.command", &format!("[{}, simulate]", quoted(&exe)));
    set("listen.public", "127.0.0.1:8000");
    println!(
        "Demo: an embedded hub and a simulated engine stand in for the model; everything lies in {}.",
        folder.path().display()
    );
    Ok(Demo { _folder: folder })
}

/// As YAML takes it.
fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display().to_string().replace('\\', "\\\\").replace('"', "\\\""))
}

/// On a thread of its own, with a runtime of its own: the supervisor's is not there yet.
fn hub() -> io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (tell, told) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("demo-hub".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let serve = async {
            let hub =
                Hub::serve(listener, Content::default(), Options { rate: Some(RATE), ..Options::default() }).await;
            match hub {
                Ok(hub) => {
                    let _ = tell.send(Ok(hub.endpoint()));
                    std::future::pending::<()>().await;
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        };
        if let Ok(runtime) = runtime {
            runtime.block_on(serve);
        }
    })?;
    told.recv().map_err(|_| io::Error::other("the embedded hub did not start"))?
}
