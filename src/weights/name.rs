//! Which names from the hub may become paths on this disk: checked before any I/O, so that a hostile
//! listing writes nothing anywhere. Knows no file system.

use std::collections::HashMap;

/// Longest component that ext4, xfs and NFS take.
const LONGEST_COMPONENT: usize = 255;
/// Longest path; PATH_MAX is 4096 with the cache's own folders before it.
const LONGEST_PATH: usize = 1024;

/// Why one file name may not be used, if it may not.
pub fn refuse_file(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("is empty");
    }
    if name.contains('\0') {
        return Some("contains a NUL byte");
    }
    if name.chars().any(char::is_control) {
        return Some("contains a control character");
    }
    if name.starts_with('/') {
        return Some("is an absolute path");
    }
    if name.contains('\\') {
        return Some("contains a backslash");
    }
    if name.len() > LONGEST_PATH {
        return Some("is longer than 1024 bytes");
    }
    for part in name.split('/') {
        match part {
            "" => return Some("has an empty path component"),
            "." | ".." => return Some("leaves its folder"),
            _ if part.len() > LONGEST_COMPONENT => return Some("has a component longer than 255 bytes"),
            _ if is_device(part) => return Some("is a device name on some file systems"),
            _ => {}
        }
    }
    // Invisible and direction-changing characters make two different names look the same to a person.
    if name
        .chars()
        .any(|c| matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'))
    {
        return Some("contains invisible characters");
    }
    None
}

/// `CON`, `nul.txt` and the like: a cache on a share of another system would write to a device.
fn is_device(part: &str) -> bool {
    let stem = part.split('.').next().unwrap_or(part).to_ascii_lowercase();
    match stem.as_str() {
        "con" | "prn" | "aux" | "nul" => true,
        _ => {
            stem.len() == 4
                && (stem.starts_with("com") || stem.starts_with("lpt"))
                && stem.ends_with(|c: char| c.is_ascii_digit() && c != '0')
        }
    }
}

/// The first name that may not be used together with those before it: the same but for case or for
/// look-alike letters (full-width, Cyrillic and Greek homoglyphs of Latin ones), or a file where another
/// name needs a folder.
pub fn refuse_set<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<(&'a str, &'static str)> {
    let mut seen: HashMap<String, Role> = HashMap::new();
    for name in names {
        let folded: String = name.chars().flat_map(char::to_lowercase).map(plain_letter).collect();
        for (at, _) in folded.match_indices('/') {
            if let Some(Role::File) = seen.insert(folded[..at].to_owned(), Role::Folder) {
                return Some((name, "needs a folder where the repository has a file"));
            }
        }
        match seen.insert(folded, Role::File) {
            Some(Role::File) => return Some((name, "differs from another file only in case or in look-alike letters")),
            Some(Role::Folder) => return Some((name, "is a file where another name needs a folder")),
            None => {}
        }
    }
    None
}

#[derive(Clone, Copy)]
enum Role {
    File,
    Folder,
}

/// The Latin letter that this one is drawn like.
fn plain_letter(c: char) -> char {
    match c {
        'а' | 'α' => 'a',
        'е' | 'ε' => 'e',
        'о' | 'ο' => 'o',
        'р' | 'ρ' => 'p',
        'с' => 'c',
        'х' | 'χ' => 'x',
        'у' => 'y',
        'і' | 'ι' => 'i',
        'ѕ' => 's',
        'ј' => 'j',
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(c as u32 - 0xfee0).unwrap_or(c),
        other => other,
    }
}

/// Why a repository's id may not be used, if it may not: the same rules as the hub's.
pub fn refuse_repo(repo: &str) -> Option<&'static str> {
    let parts: Vec<&str> = repo.split('/').collect();
    if parts.len() > 2 || parts.iter().any(|part| part.is_empty()) {
        return Some("is not of the form owner/name");
    }
    if repo.len() > 96 {
        return Some("is longer than 96 characters");
    }
    if !repo.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/')) {
        return Some("may hold only letters, digits, '-', '_' and '.'");
    }
    // "--" is what the cache's folder names put in place of the slash.
    if repo.contains("--") || repo.contains("..") {
        return Some("may not hold '--' or '..'");
    }
    if parts.iter().any(|part| part.starts_with(['-', '.']) || part.ends_with(['-', '.'])) {
        return Some("may not begin or end with '-' or '.'");
    }
    None
}

/// Why a revision may not be used, if it may not: it becomes a file under `refs/`.
pub fn refuse_revision(revision: &str) -> Option<&'static str> {
    if revision.contains("..") {
        return Some("may not hold '..'");
    }
    refuse_file(revision)
}

/// A whole commit: pinned, needs no request to be resolved.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h12_names_that_leave_the_folder_or_break_a_disk_are_refused() {
        let long = "x".repeat(300);
        for bad in [
            "",
            "../../etc/passwd",
            "/etc/passwd",
            "a/../b",
            "./a",
            "a//b",
            "a\0b",
            "a\nb",
            "..\\..\\x",
            "CON",
            "sub/nul.txt",
            "com1",
            &long,
            "mo\u{202e}del.safetensors",
            "a/",
        ] {
            assert!(refuse_file(bad).is_some(), "{bad:?} was let through");
        }
        for good in [
            "model-00001-of-00163.safetensors",
            "encoding/encoding_dsv4.py",
            ".gitattributes",
            "común.txt",
            "com10",
            "a..b",
        ] {
            assert_eq!(refuse_file(good), None, "{good:?}");
        }
    }

    #[test]
    fn h12_names_that_clash_are_refused_together() {
        assert!(refuse_set(["config.json", "Config.json"]).is_some());
        assert!(refuse_set(["config.json", "с\u{043e}nfig.json"]).is_some(), "Cyrillic es and o");
        assert!(refuse_set(["a", "a/b"]).is_some());
        assert!(refuse_set(["a/b", "a"]).is_some());
        assert_eq!(refuse_set(["a/b", "a/c", "config.json", "d"]), None);
    }

    #[test]
    fn repositories_and_revisions_follow_the_hubs_rules() {
        for good in ["gpt2", "deepseek-ai/DeepSeek-V4-Pro", "a/b.c_d-e"] {
            assert_eq!(refuse_repo(good), None, "{good}");
        }
        for bad in ["", "a/b/c", "../x", "a/..", "a--b/c", "/a", "a/", "a b/c", "-a/b"] {
            assert!(refuse_repo(bad).is_some(), "{bad}");
        }
        assert_eq!(refuse_revision("refs/pr/3"), None);
        assert!(refuse_revision("../main").is_some());
        assert!(is_commit("5f0b02c75b57c5855da9ae460ce51323ea669d8a"));
        assert!(!is_commit("5f0b02c7"));
    }
}
