use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use http::HeaderValue;

use super::edit::{self, EditError};
use super::*;
use crate::admission::Priority;

fn line(name: &str, key: &str) -> String {
    format!("{name} {}", hashed(key))
}

fn parse(text: &str) -> Result<Keys, KeysError> {
    Keys::parse(text, Path::new("keys"))
}

fn shows<'a>(keys: &'a Keys, fields: &[(&'static str, &str)]) -> Option<&'a str> {
    let mut headers = HeaderMap::new();
    for (name, value) in fields {
        headers.append(*name, HeaderValue::from_str(value).unwrap());
    }
    keys.check(&headers).map(|(_, key)| key.name.as_str())
}

#[test]
fn a_good_key_passes_in_either_header_and_nothing_else_does() {
    let keys = parse(&format!("# ours\n\n{}\n{} # two\n", line("one", "secret-1"), line("two", "secret-2"))).unwrap();
    assert_eq!(shows(&keys, &[("authorization", "Bearer secret-1")]), Some("one"));
    assert_eq!(shows(&keys, &[("authorization", "bearer secret-2")]), Some("two"));
    assert_eq!(shows(&keys, &[("x-api-key", "secret-2")]), Some("two"));
    assert_eq!(shows(&keys, &[("authorization", "Bearer secret-1"), ("x-api-key", "secret-1")]), Some("one"));
    for fields in [
        &[][..],
        &[("authorization", "Bearer wrong")],
        &[("authorization", "Bearer ")],
        &[("authorization", "Basic secret-1")],
        &[("authorization", "Bearer secret-1x")],
        &[("authorization", "Bearer secret-1"), ("authorization", "Bearer secret-1")],
        &[("authorization", "Bearer secret-1"), ("x-api-key", "wrong")],
        &[("authorization", "Bearer secret-1"), ("x-api-key", "secret-2")],
        &[("x-api-key", "secret-1"), ("x-api-key", "secret-1")],
        &[("authorization", "Basic x"), ("x-api-key", "secret-1")],
    ] {
        assert_eq!(shows(&keys, fields), None, "{fields:?}");
    }
}

#[test]
fn a_line_says_what_its_key_is_granted() {
    let text = format!(
        "{}\n{} concurrency=8 queue=16 priority=high weight=2 # ours\n{} operator\n",
        line("plain", "a"),
        line("ci", "b"),
        line("oncall", "c")
    );
    let keys = parse(&text).unwrap();
    let found: Vec<&Key> = keys.iter().collect();
    assert_eq!((found[0].terms, found[0].role), (Terms::DEFAULT, Role::Client));
    let terms = found[1].terms;
    assert_eq!((terms.concurrency.map(NonZeroU32::get), terms.queue), (Some(8), Some(16)));
    assert_eq!((terms.priority, terms.weight.get(), found[1].role), (Priority::High, 2, Role::Client));
    assert_eq!(found[2].role, Role::Operator);
    assert_eq!(line::grants(&terms, Role::Client), "concurrency=8 queue=16 priority=high weight=2");
}

#[test]
fn a_broken_file_is_refused_with_line_column_and_the_way_out() {
    assert!(matches!(parse("# nothing\n\n"), Err(KeysError::Empty { .. })));
    assert!(matches!(parse(&format!("{} operator\n", line("ops", "k"))), Err(KeysError::Empty { .. })));
    let good = line("n", "k");
    let attribute = good.len() + 2;
    for (text, column) in [
        ("name".to_owned(), 5),
        ("name sha256:abc".to_owned(), 6),
        ("  name md5:00".to_owned(), 8),
        ("a b c".to_owned(), 3),
        (format!("{good} x"), attribute),
        (format!("{good} weight=0"), attribute),
        (format!("{good} concurrency=-1"), attribute),
        (format!("{good} queue=many"), attribute),
        (format!("{good} priority=urgent"), attribute),
        (format!("{good} weight=2 weight=2"), attribute + 9),
        (format!("{} {}", "n".repeat(65), hashed("k")), 1),
    ] {
        let error = parse(&format!("\n{text}\n")).unwrap_err();
        let shown = error.to_string();
        assert!(shown.starts_with(&format!("keys:2:{column}: ")), "{text}: {shown}");
        assert!(shown.contains("; "), "no way out: {shown}");
    }
    let shown = parse("name sk-a-key-in-clear\n").unwrap_err().to_string();
    assert!(!shown.contains("clear"), "{shown}");
    let unlike = format!("{} weight=2\n{}\n", line("a", "1"), line("a", "2"));
    assert!(matches!(parse(&unlike), Err(KeysError::Malformed { line: 2, .. })));
    assert!(parse(&format!("{}\n{}\n", line("a", "1"), line("a", "2"))).is_ok(), "two keys of one name");
}

#[test]
fn a_key_is_added_and_removed_and_all_else_stays_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let key = edit::generate();
    assert_eq!((key.len(), edit::generate() == key), (48, false));
    edit::add(&path, "first", &key, &Terms::DEFAULT, Role::Client).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, format!("{}\n", line("first", &key)));

    // As somebody edits it by hand: a comment, no end of line, readable by the group and by all.
    std::fs::write(&path, format!("# ours\n{text}\n# theirs\n{}", line("third", "k"))).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let terms = Terms { weight: NonZeroU32::new(3).unwrap(), queue: Some(0), ..Terms::DEFAULT };
    edit::add(&path, "second", "other", &terms, Role::Operator).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
    let text = std::fs::read_to_string(&path).unwrap();
    let second = format!("{} queue=0 weight=3 operator", line("second", "other"));
    assert_eq!(text, format!("# ours\n{}\n\n# theirs\n{}\n{second}\n", line("first", &key), line("third", "k")));

    assert!(matches!(edit::add(&path, "first", "x", &terms, Role::Client), Err(EditError::Exists { .. })));
    assert!(matches!(edit::add(&path, "a b", "x", &terms, Role::Client), Err(EditError::Name { .. })));
    let unknown = edit::remove(&path, "frist").unwrap_err().to_string();
    assert!(unknown.contains("did you mean `first`"), "{unknown}");
    edit::remove(&path, "first").unwrap();
    let last = edit::remove(&path, "third").unwrap_err();
    assert!(matches!(last, EditError::Last { .. }), "{last}");
    edit::remove(&path, "second").unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("# ours\n\n# theirs\n{}\n", line("third", "k")));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["keys"], "something was left beside the file");
}

#[test]
fn a_link_stays_a_link_and_a_broken_file_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (file, link) = (folder.path().join("file"), folder.path().join("link"));
    edit::add(&file, "one", "k", &Terms::DEFAULT, Role::Client).unwrap();
    std::os::unix::fs::symlink("file", &link).unwrap();
    edit::add(&link, "two", "k2", &Terms::DEFAULT, Role::Client).unwrap();
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(Keys::load(&file).unwrap().0.iter().count(), 2);
    std::fs::write(&file, "one nonsense\n").unwrap();
    assert!(matches!(edit::add(&file, "three", "k", &Terms::DEFAULT, Role::Client), Err(EditError::Keys(_))));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "one nonsense\n");
}

#[test]
fn writers_at_the_same_time_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let path = &path;
            scope.spawn(move || {
                for n in 0..8 {
                    edit::add(path, &format!("k{writer}.{n}"), "k", &Terms::DEFAULT, Role::Client).unwrap();
                }
            });
        }
    });
    assert_eq!(Keys::load(&path).unwrap().0.iter().count(), 64);
}

#[test]
fn a_stamp_tells_any_change() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    assert_eq!(Stamp::at(&path), None);
    std::fs::write(&path, "a").unwrap();
    let first = Stamp::at(&path);
    assert_eq!(Stamp::at(&path), first);
    std::fs::write(&path, "ab").unwrap();
    let second = Stamp::at(&path);
    assert_ne!(second, first);
    std::fs::write(folder.path().join("new"), "ab").unwrap();
    std::fs::rename(folder.path().join("new"), &path).unwrap();
    assert_ne!(Stamp::at(&path), second, "another file of the same size");
}
