//! The hub's listing of a commit as it comes: entries of the tree API, page by page.

use serde::Deserialize;

use super::plan::{Hash, RemoteFile, Transport};

/// The `rel="next"` of a `Link` header.
pub fn next_link(header: &str) -> Option<String> {
    header.split(',').find_map(|part| {
        let (url, rest) = part.trim().strip_prefix('<')?.split_once('>')?;
        rest.split(';').any(|p| matches!(p.trim(), "rel=\"next\"" | "rel=next")).then(|| url.to_owned())
    })
}

/// One entry of the tree API.
#[derive(Deserialize)]
pub struct TreeEntry {
    /// `file` or `directory`.
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    path: String,
    lfs: Option<TreeLfs>,
    #[serde(rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct TreeLfs {
    #[serde(alias = "sha256")]
    oid: String,
    size: u64,
}

impl TreeEntry {
    pub fn into_file(self) -> Result<RemoteFile, String> {
        let (oid, size) = self.lfs.map_or((self.oid, self.size), |lfs| (lfs.oid, lfs.size));
        // It becomes a file's name; anything but a hash could be a path.
        let hash = Hash::from_hex(&oid).ok_or_else(|| format!("{oid:?}, the hash of {:?}, is no hash", self.path))?;
        let transport = self.xet_hash.map_or(Transport::Http, |hash| Transport::Xet { hash });
        Ok(RemoteFile { name: self.path, size, hash, transport })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_whose_hashes_are_paths_is_refused() {
        let entry: TreeEntry =
            serde_json::from_str(r#"{"type":"file","oid":"../../../x","size":1,"path":"a.json"}"#).unwrap();
        assert!(entry.into_file().is_err());
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        assert_eq!(next_link(r#"<https://h/a?cursor=x>; rel="next""#).as_deref(), Some("https://h/a?cursor=x"));
        assert_eq!(next_link(r#"<https://h/p>; rel="prev", </q>; rel="next""#).as_deref(), Some("/q"));
        assert_eq!(next_link(r#"<https://h/p>; rel="prev""#), None);
    }
}
