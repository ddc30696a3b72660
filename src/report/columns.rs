//! A table for people, in as many columns of the terminal as there are.
//!
//! What can be left out is left out before a line would wrap: first the long headings, then the columns that repeat
//! others (a share of what stands beside it), and the middle of locations at all times.

use super::ReportError;
use super::text::fitted;
use std::io::Write;
use tabled::builder::Builder;
use tabled::settings::object::{Columns, Rows};
use tabled::settings::{Alignment, Modify, Style};

/// Characters that a location keeps before other columns go.
const LEAST_LOCATION: usize = 28;

/// Characters that words keep where there is least room.
const SHORT_WORDS: usize = 11;

/// What is done with a column.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Figures: to the right.
    Figures,
    /// Figures that a narrow terminal does without.
    Share,
    /// Words: to the left.
    Words,
    /// What takes all the room that is left. One per table.
    Location,
}

/// One column.
pub(super) struct Column {
    /// Its heading.
    pub(super) heading: &'static str,
    /// The same where there is little room.
    pub(super) short: &'static str,
    /// What is done with it.
    pub(super) kind: Kind,
}

/// Writes the rows, each with one cell per column. `width` is the terminal's, if it is one.
pub(super) fn write_columns(
    columns: &[Column],
    rows: &[Vec<String>],
    width: Option<usize>,
    out: &mut dyn Write,
) -> Result<(), ReportError> {
    if rows.is_empty() {
        writeln!(out, "nothing to show")?;
        return Ok(());
    }
    let rows = &with_errors_in_line(columns, rows);
    let width = width.unwrap_or(usize::MAX);
    let layouts = [(false, true), (true, true), (true, false)];
    let room = |(short, shares)| width.saturating_sub(taken(columns, rows, short, shares));
    let fits = |layout: &&(bool, bool)| room(**layout) >= LEAST_LOCATION;
    let (short, shares) = *layouts.iter().find(fits).unwrap_or(&layouts[2]);
    let location = room((short, shares)).max(LEAST_LOCATION / 2);
    let kept: Vec<(usize, &Column)> = kept(columns, shares).collect();
    let mut table = Builder::default();
    table.push_record(kept.iter().map(|(_, column)| heading(column, short)));
    for row in rows {
        table.push_record(kept.iter().map(|(at, column)| match column.kind {
            Kind::Location => fitted(&row[*at], location).into_owned(),
            Kind::Words if !shares => fitted(&row[*at], SHORT_WORDS).into_owned(),
            _ => row[*at].clone(),
        }));
    }
    let mut table = table.build();
    table.with(Style::psql());
    for (at, (_, column)) in kept.iter().enumerate() {
        if matches!(column.kind, Kind::Figures | Kind::Share) {
            table.with(Modify::new(Columns::one(at)).with(Alignment::right()));
        }
    }
    table.with(Modify::new(Rows::first()).with(Alignment::left()));
    for line in table.to_string().lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Fills figures up on their right, so that in a column of them the errors begin below each other.
fn with_errors_in_line(columns: &[Column], rows: &[Vec<String>]) -> Vec<Vec<String>> {
    let mut rows = rows.to_vec();
    let error = |cell: &str| cell.find(" ±").map_or(0, |at| cell[at..].chars().count());
    for (at, _) in columns.iter().enumerate().filter(|(_, column)| column.kind == Kind::Figures) {
        let longest = rows.iter().map(|row| error(&row[at])).max().unwrap_or(0);
        for row in &mut rows {
            let missing = longest - error(&row[at]);
            row[at].extend(std::iter::repeat_n(' ', missing));
        }
    }
    rows
}

fn heading(column: &Column, short: bool) -> &'static str {
    if short { column.short } else { column.heading }
}

fn kept(columns: &[Column], shares: bool) -> impl Iterator<Item = (usize, &Column)> {
    columns.iter().enumerate().filter(move |(_, column)| shares || column.kind != Kind::Share)
}

/// Characters of a line that are not the location's: the other cells, two blanks per cell, a border between two.
fn taken(columns: &[Column], rows: &[Vec<String>], short: bool, shares: bool) -> usize {
    let mut taken = 0;
    for (at, column) in kept(columns, shares) {
        taken += 3;
        if column.kind != Kind::Location {
            let most = if column.kind == Kind::Words && !shares { SHORT_WORDS } else { usize::MAX };
            let cells = rows.iter().map(|row| row[at].chars().count().min(most));
            taken += cells.chain([heading(column, short).len()]).max().unwrap_or(0);
        }
    }
    taken.saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 4] = [
        Column { heading: "Location", short: "Location", kind: Kind::Location },
        Column { heading: "Total Memory", short: "Total", kind: Kind::Figures },
        Column { heading: "Total %", short: "%", kind: Kind::Share },
        Column { heading: "Thread", short: "Thread", kind: Kind::Words },
    ];

    fn lines(width: Option<usize>) -> Vec<String> {
        let location = "Application.handle (/srv/shop/lib/python3.12/site-packages/shop/handlers.py:120)";
        let row = vec![location.to_owned(), "1023.9 MiB".into(), "100.0%".into(), "4242 (worker)".into()];
        let mut out = Vec::new();
        write_columns(&COLUMNS, &[row], width, &mut out).unwrap();
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn no_rows_are_no_table() {
        let mut out = Vec::new();
        write_columns(&COLUMNS, &[], Some(80), &mut out).unwrap();
        assert_eq!(out, b"nothing to show\n");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in 56..200 {
            for line in lines(Some(width)) {
                assert!(line.chars().count() <= width, "{width}: {line}");
            }
        }
    }

    #[test]
    fn errors_begin_below_each_other() {
        let row = |figure: &str| vec!["here".to_owned(), figure.to_owned(), String::new(), String::new()];
        let mut out = Vec::new();
        write_columns(&COLUMNS, &[row("12.0 MiB ±0.8"), row("1.0 MiB ±10.1"), row("0 B")], None, &mut out)
            .unwrap();
        let text = String::from_utf8(out).unwrap();
        let ends = |figure: &str| {
            let line = text.lines().find(|line| line.contains(figure)).unwrap();
            line.chars().take_while(|c| *c != '±').collect::<String>().trim_end().chars().count()
        };
        assert_eq!(ends("12.0 MiB"), ends("1.0 MiB ±10"));
        assert!(text.contains("|      0 B       |"), "{text}");
    }

    #[test]
    fn what_there_is_no_room_for_is_left_out_in_order() {
        assert!(lines(None)[2].contains("site-packages/shop/handlers.py:120)"));
        assert!(lines(None)[0].contains("Total Memory") && lines(Some(80))[0].contains("Total Memory"));
        assert!(!lines(Some(70))[0].contains("Memory") && lines(Some(70))[0].contains('%'));
        assert!(!lines(Some(60))[0].contains('%') && lines(Some(60))[2].contains("1023.9 MiB"));
    }
}
