"""Words that the data sets are made of."""

from __future__ import annotations


def _listed(text: str) -> list[str]:
    """The entries of a text, which are separated by a bar or a line break."""
    return [entry for line in text.split("\n") for entry in line.split("|") if entry]


FIRST_NAMES = _listed("""
Aaron|Abigail|Adam|Adele|Agnes|Aisha|Alan|Albert|Alice|Amara|Amelia|Amir|Ana|Andrea|Andrew|Angela|Anita|Anna|Anthony
Antonio|Arjun|Arthur|Astrid|Barbara|Beatrice|Benjamin|Bernard|Bianca|Boris|Brian|Bruno|Camila|Carlos|Carmen|Caroline
Catherine|Cecilia|Charles|Charlotte|Chen|Chloe|Christian|Christine|Clara|Claudia|Clement|Colin|Conrad|Daniel|Daria
David|Deborah|Denise|Derek|Diana|Diego|Dmitri|Dominic|Dora|Dorothy|Edgar|Edith|Edward|Elena|Elias|Elisabeth|Ella|Emil
Emily|Emma|Eric|Esther|Ethan|Eugene|Eva|Fatima|Felix|Fiona|Florence|Frances|Frank|Frederick|Gabriel|George|Gloria
Grace|Greta|Gregory|Hannah|Harold|Harriet|Hassan|Hector|Helen|Henry|Hugo|Ibrahim|Ida|Igor|Ingrid|Irene|Isaac|Isabel
Ivan|Jacob|James|Jane|Jasmine|Javier|Jean|Jennifer|Jeremy|Joan|Johan|John|Jonas|Joseph|Judith|Julia|Julian|Karen|Karl
Katarina|Kenji|Kevin|Kim|Klara|Lars|Laura|Laurence|Leah|Leo|Leon|Lillian|Linda|Louis|Lucas|Lucia|Luis|Lydia|Magnus
Manuel|Marcus|Margaret|Maria|Marie|Mark|Martha|Martin|Mary|Matthew|Max|Maya|Michael|Mina|Miriam|Mohammed|Monica|Nadia
Nathan|Nicholas|Nina|Noah|Nora|Oliver|Olivia|Omar|Oscar|Otto|Pablo|Patricia|Paul|Pedro|Peter|Philip|Priya|Rachel
Rafael|Ralph|Raymond|Rebecca|Richard|Rita|Robert|Rosa|Ruth|Samuel|Sandra|Sara|Sebastian|Simon|Sofia|Sonia|Stella
Stephen|Susan|Sven|Sylvia|Tara|Teresa|Theo|Thomas|Tobias|Ursula|Valentin|Vera|Victor|Victoria|Vincent|Walter|Wei
William|Yasmin|Yusuf|Zara|Zoe
""")

LAST_NAMES = _listed("""
Adams|Ahmed|Allen|Andersson|Bailey|Baker|Barnes|Bauer|Becker|Bell|Bennett|Berg|Bianchi|Black|Brandt|Brooks|Brown|Burke
Butler|Campbell|Carter|Castro|Chang|Clark|Cohen|Collins|Cook|Cooper|Costa|Cox|Cruz|Davies|Davis|Diaz|Dixon|Dubois
Edwards|Ellis|Evans|Farmer|Fernandez|Fischer|Fisher|Fleming|Ford|Foster|Fox|Fraser|Garcia|Gibson|Gomez|Gordon|Graham
Grant|Gray|Green|Griffin|Gupta|Hall|Hamilton|Hansen|Harris|Harrison|Hart|Harvey|Hayes|Henderson|Hill|Hoffman|Holmes
Howard|Hughes|Hunt|Hunter|Ibrahim|Jackson|Jansen|Jenkins|Jensen|Johnson|Jones|Jordan|Kaiser|Kelly|Kennedy|Khan|Kim
King|Klein|Knight|Koch|Kumar|Lambert|Lane|Larsen|Lawrence|Lee|Lewis|Li|Lindberg|Lopez|Maier|Marshall|Martin|Martinez
Mason|Matthews|Meyer|Miller|Mills|Mitchell|Moore|Morales|Morgan|Morris|Murphy|Murray|Nelson|Newman|Nguyen|Nielsen
Novak|Olsen|Ortiz|Owen|Palmer|Park|Parker|Patel|Perez|Perry|Peters|Petrov|Phillips|Porter|Powell|Price|Ramirez|Reed
Reyes|Reynolds|Richards|Richardson|Rivera|Roberts|Robinson|Rogers|Romano|Rose|Ross|Rossi|Russell|Ryan|Sanchez|Sanders
Santos|Schmidt|Schneider|Scott|Shaw|Silva|Simmons|Simpson|Singh|Smith|Spencer|Stevens|Stewart|Stone|Sullivan|Suzuki
Tanaka|Taylor|Thomas|Thompson|Torres|Tucker|Turner|Wagner|Walker|Wallace|Walsh|Wang|Ward|Warren|Watson|Weber|Wells
West|White|Williams|Wilson|Wolf|Wood|Wright|Yang|Young|Zhang|Zimmerman
""")

RANKS = _listed("""
junior|senior|lead|principal|deputy|assistant|regional|chief|head|associate
""")

ROLES = _listed("""
accountant|account manager|actuary|analyst|architect|auditor|biologist|bookkeeper|business analyst|buyer|chemist
civil engineer|claims adjuster|consultant|controller|copywriter|credit analyst|curator|customer support|data analyst
data engineer|data scientist|designer|developer|dispatcher|doctor|economist|editor|electrician|engineer|estimator
event planner|facility manager|field technician|financial adviser|geologist|graphic designer|hotel manager|inspector
instructor|journalist|laboratory assistant|lawyer|librarian|logistics manager|machinist|market researcher|mechanic
network engineer|nurse|office manager|operations manager|paralegal|payroll clerk|pharmacist|photographer|physicist
pilot|planner|producer|product manager|professor|programmer|project manager|purchasing agent|quality engineer
receptionist|recruiter|researcher|sales engineer|sales manager|scientist|secretary|security officer|site manager
statistician|store manager|surveyor|system administrator|tax adviser|teacher|technical writer|tester|trader|trainer
translator|treasurer|underwriter|warehouse manager|web developer
""")

COMPANIES = _listed("""
Acorn|Alder Bank|Alpine Foods|Amber Press|Anchor Marine|Apex Tools|Arbor Homes|Atlas Freight|Aurora Power
Beacon Health|Birch Paper|Blue River|Bridge Capital|Bright Solar|Canyon Travel|Cedar Clinic|Central Rail
Citadel Security|City Water|Clear Glass|Cliff Mining|Cloud Nine|Coast Shipping|Compass Maps|Copper Works|Coral Hotels
Crown Motors|Crystal Lab|Delta Airways|Desert Stone|Diamond Cut|Dragon Games|Eagle Optics|East Harbor|Echo Audio
Elm Insurance|Ember Heating|Falcon Courier|Fern Garden|First Mutual|Forest Timber|Fountain Drinks|Fox Media
Garnet Studio|Giant Cranes|Globe Books|Golden Wheat|Granite Build|Green Valley|Gulf Energy|Harbor Bank|Harvest Farm
Hawk Defence|Heron Software|High Peak|Horizon Telecom|Iron Bridge|Island Ferries|Ivory Dental|Jade Trading
Jupiter Films|Key Logistics|Lake District|Lantern Press|Laurel School|Lighthouse|Lion Brewery|Lotus Spa|Lunar Systems
Maple Dairy|Marble Arts|Meadow Care|Mercury Post|Metro Transit|Mill Stream|Mint Pharmacy|Moon Textiles|Mountain Gear
North Star|Oak Furniture|Ocean Foods|Olive Kitchen|Onyx Data|Opal Design|Orchard Fruit|Orion Labs|Owl Education
Palm Resorts|Pearl Jewels|Pilot Pens|Pine Cabinets|Pioneer Seeds|Polar Ice|Prairie Grain|Quartz Clocks|Quiet Fans
Rain Forest|Raven Legal|Red Brick|Ridge Cycles|River Bank|Robin Toys|Royal Mint|Ruby Events|Sable Fashion
Saffron Spice|Sail Cloth|Salt Lake|Sand Castle|Shore Marine|Silver Line|Sky Bridge|Snow Sports|South Gate|Spring Water
Spruce Paint|Steel Frame|Stone Wall|Summit Bank|Sun Harvest|Swift Cars|Table Rock|Thunder Audio|Tiger Gym|Timber Yard
Tower Hotels|Trail Boots|Tulip Bulbs|Union Trust|Valley Wines|Velvet Sofa|Vista Glass|Walnut Grove|Water Mill
West Wind|White Cloud|Willow Clinic|Winter Coats|Wolf Tech
""")

PRODUCTS = _listed("""
invoice export|login page|mobile app|search index|report builder|payment form|customer portal|backup service
mail gateway|calendar sync|file upload|price list|shopping cart|order history|user directory|phone system|web shop
printer driver|data warehouse|time sheet|inventory list|delivery tracker|chat widget|video call|password reset
newsletter|dashboard|contract archive|ticket queue|stock forecast|barcode scanner|access card|expense form|translation
photo gallery|map view|audit log|billing run|notification service|spreadsheet import
""")

PROBLEMS = _listed("""
stops with an error message|takes several minutes to load|shows an empty page|loses the last change
sends every message twice|does not accept the new address|forgets the selected language|shows yesterday's figures
rounds the total to the wrong cent|refuses the upload without a reason|logs people out after a minute
prints the second page upside down|ignores the filter on the date|counts some orders twice|hangs at ninety percent
freezes when two people save at once|cuts long names in half|sorts the list in the wrong order
shows the prices without tax|does not open on older phones|asks for the password again and again
drops the connection during the night|marks paid invoices as open|mixes up the two warehouses
""")

PEOPLE = _listed("""
our accountant|the night shift|a customer in Norway|the sales team|my colleague|the warehouse crew|the whole office
the new intern|our largest client|the finance department|the support desk|two of our drivers|the branch in Lyon
the auditors|everyone on the second floor|the marketing team|our supplier|the project lead|a visitor|the board
""")

MOMENTS = _listed("""
since Monday|after the last update|every morning|during the stock count|at the end of the month|right after lunch
when the server restarts|since the holiday|whenever it rains heavily|shortly before closing time|for two weeks now
on the first day of the quarter|while a backup runs|since we moved to the new office|every time the network is slow
""")

ACTIONS = _listed("""
clear the browser cache|restart the computer|install it again|use another account|switch to the old version
change the time zone|shorten the file name|turn off the firewall|ask the hosting provider|read the manual
compare both spreadsheets|export a smaller range|delete the temporary files|renew the certificate|wait for an hour
""")

REQUESTS = _listed("""
Please tell us when this will be repaired.|Could somebody call me back this afternoon?
We need an answer before Friday.|Is there a way to undo the last import?|Please restore the records from the backup.
A short explanation would help us.|Can we get a list of all the orders concerned?
Please raise the priority of this ticket.|Thank you for looking into it.|Would it help to send you the log files?
Please do not close this ticket before we have tested it.
""")

SENTENCES = (
    "The {product} {problem} {moment}.",
    "{Moment} the {product} {problem}, and {people} cannot work.",
    "{People} told us that the {product} {problem}.",
    "We have tried to {action}, but the {product} still {problem}.",
    "As soon as {people} opens the {product}, it {problem}.",
    "I asked {people} to {action}, and for {number} minutes everything was fine.",
    "Order {number} was not affected, although {people} used the same {product}.",
    "About {number} records are wrong, most of them from {people}.",
    "The manual says that one should {action}, which did not change anything.",
    "It started {moment}, when {people} first used the {product}.",
    "{People} had to {action} before the {product} would start again.",
    "Yesterday it was the {product}, today the {product2} {problem} too.",
)
