//! Where a redirect may lead, and what of an address may be shown: the rules against a hub, or somebody on the way, that
//! sends the fetcher to where it has no business. Pure.

use std::net::IpAddr;

use reqwest::Url;
use reqwest::redirect::Attempt;

/// Hops of one request. Browsers take 20, the hub needs 2.
const REDIRECTS: usize = 10;

/// Where a redirect may lead. reqwest itself drops the token when host or port change.
pub fn follow(attempt: Attempt<'_>, hub_is_local: bool) -> reqwest::redirect::Action {
    // The first one is what was asked.
    if !attempt.previous().first().is_some_and(|asked| asked.path().contains("/api/models/")) {
        return attempt.stop();
    }
    let from = attempt.previous().last().cloned();
    match refuse_hop(from.as_ref(), attempt.url(), attempt.previous().len(), hub_is_local) {
        Some(why) => attempt.error(why),
        None => attempt.follow(),
    }
}

pub fn refuse_hop(from: Option<&Url>, to: &Url, hops: usize, hub_is_local: bool) -> Option<String> {
    if hops > REDIRECTS {
        return Some(format!("more than {REDIRECTS} redirects"));
    }
    let to_shown = without_query(to.as_str());
    match to.scheme() {
        "https" => {}
        "http" if from.is_some_and(|from| from.scheme() == "http") => {}
        _ => return Some(format!("{to_shown} is not as safe as where it came from")),
    }
    // Metadata services of clouds answer on link-local addresses, and hand out the machine's credentials.
    if address(to).is_some_and(|ip| is_link_local(ip) || ip.is_unspecified() || ip.is_multicast()) {
        return Some(format!("{to_shown} is an address no hub has"));
    }
    (is_loopback(to) && !hub_is_local).then(|| format!("{to_shown} is this machine, and the hub is not"))
}

fn address(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    let ip: IpAddr = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
    Some(ip.to_canonical())
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

pub fn is_loopback(url: &Url) -> bool {
    url.host_str() == Some("localhost") || address(url).is_some_and(|ip| ip.is_loopback())
}

/// Signed URLs carry their right of access in the query.
pub fn without_query(url: &str) -> String {
    url.split(['?', '#']).next().unwrap_or(url).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(from: &str, to: &str) -> Option<String> {
        refuse_hop(Some(&from.parse().unwrap()), &to.parse().unwrap(), 1, false)
    }

    #[test]
    fn h05_redirects_lead_only_where_a_hub_may_lead() {
        assert_eq!(hop("https://hub.example/a", "https://cdn.example/b?sig=1"), None);
        assert_eq!(hop("http://mirror.example/a", "http://cdn.example/b"), None);
        assert!(hop("https://hub.example/a", "http://cdn.example/b").is_some(), "downgrade");
        assert!(hop("https://hub.example/a", "file:///etc/passwd").is_some());
        assert!(hop("http://hub.example/a", "http://169.254.169.254/latest/meta-data").is_some());
        assert!(hop("http://hub.example/a", "http://[::ffff:169.254.169.254]/").is_some(), "mapped");
        assert!(hop("http://hub.example/a", "http://[fe80::1]/").is_some());
        assert!(hop("http://hub.example/a", "http://127.0.0.1:8001/metrics").is_some());
        let url: Url = "https://hub.example/a".parse().unwrap();
        assert!(refuse_hop(Some(&url), &url, REDIRECTS + 1, false).is_some());
    }
}
