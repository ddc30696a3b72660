//! `docs/running.md`: its systemd unit is one, its YAML is YAML, and its commands are heaptap's.

use std::path::Path;
use std::process::Command;

use yaml_rust2::YamlLoader;

fn page() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/running.md")).unwrap()
}

/// The fenced blocks of this language.
fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    let found: Vec<_> = page.split(&fence).skip(1).filter_map(|rest| rest.split("\n```").next()).collect();
    assert!(!found.is_empty(), "no {language} in docs/running.md");
    found
}

#[test]
fn the_units_are_what_systemd_reads() {
    let binary = assert_cmd::cargo::cargo_bin!("heaptap").to_str().unwrap();
    for unit in blocks(&page(), "ini") {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("heaptap@.service");
        std::fs::write(&path, unit.replace("/usr/local/bin/heaptap", binary)).unwrap();
        let Ok(output) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output()
        else {
            eprintln!("SKIPPED: systemd units: no systemd-analyze here");
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let ours: Vec<_> = said.lines().filter(|line| line.contains("heaptap@")).collect();
        assert!(output.status.success() && ours.is_empty(), "{said}");
    }
}

#[test]
fn the_kubernetes_profile_asks_for_what_is_needed() {
    for text in blocks(&page(), "yaml") {
        let documents = YamlLoader::load_from_str(text).unwrap();
        let context = &documents[0]["securityContext"];
        let added: Vec<_> =
            context["capabilities"]["add"].as_vec().unwrap().iter().map(|c| c.as_str()).collect();
        assert_eq!(added, [Some("SYS_PTRACE"), Some("SYS_ADMIN")]);
        assert_eq!(context["runAsUser"].as_i64(), Some(0));
        assert_eq!(context["seccompProfile"]["type"].as_str(), Some("Unconfined"));
    }
}

#[test]
fn every_option_in_it_exists() {
    let help = |verb: &str| {
        let output =
            Command::new(assert_cmd::cargo::cargo_bin!("heaptap")).args([verb, "--help"]).output().unwrap();
        assert!(output.status.success(), "heaptap {verb} --help");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let page = page().replace("\\\n", " ");
    let mut seen = 0;
    for verb in ["attach", "detach", "doctor"] {
        let help = help(verb);
        for line in page.lines().filter(|line| line.contains("heaptap ")) {
            let Some((before, after)) = line.split_once(&format!(" {verb} --pid")) else { continue };
            let after = after.split(['\'', '`', ';', '#']).next().unwrap_or_default();
            // Shell substitutions in it have options of their own.
            let own = before.rsplit("heaptap").next().unwrap_or_default();
            for option in
                own.split_whitespace().chain(outside_of_substitutions(after)).filter(|w| w.starts_with('-'))
            {
                let option = option.trim_end_matches('"');
                assert!(help.contains(option), "heaptap {verb} does not know {option}: {line}");
                seen += 1;
            }
        }
    }
    assert!(seen >= 5, "the search for options finds nothing any more");
}

fn outside_of_substitutions(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_i32;
    text.split_whitespace().filter(move |word| {
        let inside = depth > 0 || word.contains("$(");
        depth += word.matches('(').count() as i32 - word.matches(')').count() as i32;
        !inside
    })
}
