//! Line tables decoded here give, for every instruction of tricky source, the line that the interpreter itself gives.

mod common;
mod support;

use heaptap::cpython::layout::LineTableFormat;
use heaptap::cpython::line_table::line_at;
use serde_json::Value;
use std::io::BufRead;
use support::{Program, interpreters};

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn every_instruction_has_the_line_that_python_gives_it() {
    for interpreter in interpreters() {
        let program = Program::start(&interpreter, "lines.py");
        let (mut codes, mut instructions, mut without) = (0, 0, 0);
        // Read to the end: `program` owns the pipe and is reaped afterwards.
        let mut program = program;
        drop(program.stdin.take());
        for line in std::io::BufReader::new(&mut program.stdout).lines() {
            let code: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let format = match code["format"].as_str().unwrap() {
                "lnotab" => LineTableFormat::Lnotab,
                "linetable" => LineTableFormat::Linetable,
                "locations" => LineTableFormat::Locations,
                other => panic!("{other}"),
            };
            let (table, first) =
                (unhex(code["table"].as_str().unwrap()), code["first"].as_i64().unwrap() as i32);
            codes += 1;
            for pair in code["lines"].as_array().unwrap() {
                let (offset, expected) =
                    (pair[0].as_i64().unwrap() as i32, pair[1].as_i64().map(|n| n as i32));
                let found = line_at(format, &table, first, offset);
                assert_eq!(found, expected, "{}: {} at {offset}", interpreter.name, code["name"]);
                instructions += 1;
                without += usize::from(expected.is_none());
            }
        }
        eprintln!("{}: {codes} codes, {instructions} instructions, {without} without line", interpreter.name);
        assert!(codes >= 40 && instructions > 5000, "{}: only {codes}, {instructions}", interpreter.name);
    }
}
